"""States written to files while computing goes on.

A state is first copied aside, tensor by tensor, by a thread of its own: forward and backward only
read it, and the next optimizer step waits until it is copied. Another thread writes the copy.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from swarmnode.worker.models import save_tensors
from swarmnode.worker.training.state import StageState

OnDone = Callable[[Path, BaseException | None], None]
"""Called in another thread with the file, and with what went wrong if it is not there."""


class Snapshots:
    """Copies and writes, one state after the other, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="copy")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._newest: dict[int, tuple[int, Future[Path]]] = {}

    def start(self, stage: int, state: StageState, path: Path, on_done: OnDone) -> None:
        """Write `state` as it is now to `path`; it appears there complete or not at all."""
        written: Future[Path] = Future()
        self._newest[stage] = (state.step, written)
        written.add_done_callback(lambda done: on_done(path, done.exception()))
        state.copying = self._copier.submit(self._copy, state.tensors(), path, written)

    def await_existing(self, stage: int, step: int, on_done: OnDone) -> bool:
        """Call `on_done` when the newest file of `stage` is written, if it is of `step`."""
        newest = self._newest.get(stage)
        if newest is None or newest[0] != step:
            return False

        def report(done: Future[Path]) -> None:
            error = done.exception()
            on_done(Path() if error is not None else done.result(), error)

        newest[1].add_done_callback(report)
        return True

    def close(self) -> None:
        """Finish what was started."""
        self._copier.shutdown()
        self._writer.shutdown()

    def _copy(self, tensors: dict[str, Tensor], path: Path, written: Future[Path]) -> None:
        try:
            copies = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
            self._writer.submit(self._write, copies, path, written)
        except BaseException as error:  # out of memory: whoever waits for the file must know
            written.set_exception(error)

    def _write(self, tensors: dict[str, Tensor], path: Path, written: Future[Path]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(path, tensors)
        except BaseException as error:
            written.set_exception(error)
        else:
            written.set_result(path)
