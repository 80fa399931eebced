"""States written to files while computing goes on.

A state is first copied aside, tensor by tensor, by a thread of its own: forward and backward only
read it, and the next optimizer step waits until it is copied. Another thread writes the copy.
"""

from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from swarmnode.worker.models import save_tensors
from swarmnode.worker.training.state import StageState

OnDone = Callable[[Path, BaseException | None], None]
"""Called, mostly in another thread, with the file, and with what went wrong if it is not there:
CancelledError if a newer state was written in its place."""


@dataclass(eq=False)
class _Write:
    """A state on its way to a file."""

    step: int
    path: Path
    written: Future[None] = field(default_factory=Future)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """What is copied so far; nothing any more once it is written, or need not be."""
    is_given_up: bool = False
    """Whether its history was given up while it was written: the file goes again."""


class Snapshots:
    """Copies and writes, one state after the other, in the order in which they were asked for.

    Bound: of each stage at most two copies, the one that is written next, or now, and one that
    waits for it. Whoever can do without asks `is_writing` before.
    """

    def __init__(self) -> None:
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="copy")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._writes: dict[int, list[_Write]] = {}
        """Of each stage what is not written yet, and the newest."""

    def is_writing(self, stage: int) -> bool:
        """Whether something of `stage` is not written yet."""
        return any(not write.written.done() for write in self._writes.get(stage, ()))

    def start(self, stage: int, state: StageState, path: Path, on_done: OnDone) -> None:
        """Write `state` as it is now to `path`; it appears there complete or not at all.

        It takes the place of another one of `stage` that waits for the one that is written.
        """
        unfinished = [w for w in self._writes.get(stage, ()) if not w.written.done()]
        if len(unfinished) > 1 and unfinished[-1].written.cancel():
            unfinished.pop().tensors.clear()
        write = _Write(state.step, path)
        self._writes[stage] = [*unfinished, write]
        _report(write, on_done)
        state.copying = self._copier.submit(self._copy, state.tensors(), write)

    def await_existing(self, stage: int, step: int, on_done: OnDone) -> bool:
        """Call `on_done` when the file of `stage` is written that is on its way, or was the
        newest, if it is of `step`."""
        for write in self._writes.get(stage, ()):
            if write.step == step:
                _report(write, on_done)
                return True
        return False

    def rewind(self, step: int) -> None:
        """A generation begins after `step` committed steps: what is being written of more, or was
        written last, is of a history that was given up, and must not be taken for what is computed
        again."""
        for stage, writes in self._writes.items():
            for write in writes:
                if write.step > step:
                    write.is_given_up = True
                    write.written.cancel()
                    if write.written.done():
                        write.path.unlink(missing_ok=True)
            self._writes[stage] = [write for write in writes if write.step <= step]

    def close(self) -> None:
        """Finish what was started."""
        self._copier.shutdown()
        self._writer.shutdown()

    def _copy(self, tensors: dict[str, Tensor], write: _Write) -> None:
        try:
            for name, tensor in tensors.items():
                write.tensors[name] = tensor.detach().to("cpu", copy=True)
                if write.written.cancelled():
                    write.tensors.clear()
                    return
            self._writer.submit(self._write, write)
        except BaseException as error:  # out of memory: whoever waits for the file must know
            write.tensors.clear()
            if write.written.set_running_or_notify_cancel():
                write.written.set_exception(error)

    def _write(self, write: _Write) -> None:
        if not write.written.set_running_or_notify_cancel():
            return
        failure: BaseException | None = None
        try:
            write.path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(write.path, write.tensors)
            if write.is_given_up:
                write.path.unlink()
                raise CancelledError
        except BaseException as error:
            failure = error
        write.tensors.clear()
        if failure is None:
            write.written.set_result(None)
        else:
            write.written.set_exception(failure)


def _report(write: _Write, on_done: OnDone) -> None:
    def report(done: Future[None]) -> None:
        on_done(write.path, CancelledError() if done.cancelled() else done.exception())

    write.written.add_done_callback(report)
