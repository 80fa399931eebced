"""The verbs of checkpoints: of a job through its node, or of a folder without any node."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from swarmnode.cli import show
from swarmnode.cli.client import NodeClient
from swarmnode.domain import BlobRef
from swarmnode.errors import DataError, NotFoundError, SwarmError
from swarmnode.http.api import CheckpointView, Work
from swarmnode.http.work import checkpoint_view
from swarmnode.p2p.checkpoint_files import (
    MANIFEST_FILE,
    SHELF_FOLDER,
    Audit,
    Shelf,
    audit_folder,
    audit_shelf,
    read_checkpoint,
    read_stored,
    write_folder,
)
from swarmnode.p2p.checkpoints import Checkpoint

BAR_AFTER_S = 2.0
"""What takes longer than this gets a progress bar."""
ClientOf = Callable[[], NodeClient]


def list_checkpoints(client_of: ClientOf, place: str, as_json: bool) -> None:
    """Show the checkpoints of a job, of its folder, or of an exported folder."""
    folder = _folder(place)
    if folder is None:
        with client_of() as client:
            views = client.checkpoints(place)
    else:
        views = tuple(checkpoint_view(each) for each in _checkpoints_in(folder))
    if as_json:
        print(json.dumps([asdict(view) for view in views]))
    elif views:
        _print_table(views)
    else:
        print("no checkpoint yet")


def verify(client_of: ClientOf, place: str, as_json: bool) -> int:
    """Check every byte; one line for each damage. The exit status: 1 if there is any."""
    folder = _folder(place)
    if folder is None:
        with client_of() as client:
            audits = _finished(client.verify_checkpoints(place), "checking").audits or ()
    else:
        total = sum(each.manifest.num_bytes for each in _readable_in(folder))
        with _bar("checking", total) as advance:
            if (folder / MANIFEST_FILE).exists():
                audits = (audit_folder(folder, advance),)
            else:
                audits = audit_shelf(_shelf(folder), _blobs(folder), advance)
    if not audits:
        raise NotFoundError(f"{place} has no checkpoint yet")
    if as_json:
        print(json.dumps([asdict(found) for found in audits]))
    else:
        _print_audits(audits)
    return 1 if any(found.problems for found in audits) else 0


def export(
    client_of: ClientOf, place: str, directory: Path, step: int | None, as_json: bool
) -> None:
    """Write one checkpoint as a folder that stands alone."""
    folder = _folder(place)
    if folder is None:
        with client_of() as client:
            works = client.export_checkpoint(place, directory, step)
            done = _finished(works, "writing").step
    else:
        done = _export_from(folder, directory.absolute(), step)
    if done is None:
        raise SwarmError(f"the node did not say whether {directory} is written")
    if as_json:
        print(json.dumps({"step": done, "directory": str(directory.absolute())}))
    else:
        print(f"the checkpoint after {done} steps is in {directory}")


# ---- without a node ----------------------------------------------------------------------------


def _folder(place: str) -> Path | None:
    """The folder that `place` names; None if it is a job. Raises: NotFoundError, DataError."""
    path = Path(place).expanduser()
    if not path.is_dir():
        if "/" in place:
            raise NotFoundError(f"{place}: no such folder")
        return None
    if not (path / MANIFEST_FILE).exists() and not (path / SHELF_FOLDER).is_dir():
        raise DataError(
            f"{path} is no checkpoint: it has neither {MANIFEST_FILE} nor {SHELF_FOLDER}/"
        )
    return path.absolute()


def _shelf(folder: Path) -> Shelf:
    return Shelf(folder / SHELF_FOLDER)


def _blobs(folder: Path) -> Path:
    """The blob store of the home that a job's folder is in: HOME/jobs/JOB."""
    return folder.parent.parent / "blobs"


def _checkpoints_in(folder: Path) -> Iterator[Checkpoint]:
    """Raises: DataError if one cannot be read."""
    if (folder / MANIFEST_FILE).exists():
        yield read_checkpoint(folder / MANIFEST_FILE)
        return
    shelf = _shelf(folder)
    yield from (shelf.load(step) for step in shelf.steps())


def _readable_in(folder: Path) -> Iterator[Checkpoint]:
    """Those that can be read; an audit says what is wrong with the others."""
    places = [folder / MANIFEST_FILE, *map(_shelf(folder).path, _shelf(folder).steps())]
    for path in places:
        try:
            yield read_checkpoint(path)
        except DataError:
            continue


def _export_from(folder: Path, directory: Path, step: int | None) -> int:
    from swarmnode.coordinator.checkpoints import tokenizer_files
    from swarmnode.coordinator.job_files import TOKENIZER_FOLDER

    if (folder / MANIFEST_FILE).exists():
        raise DataError(f"{folder} stands alone already: copy it")
    shelf = _shelf(folder)
    if not shelf.steps():
        raise NotFoundError(f"{folder} has no checkpoint yet")
    checkpoint = shelf.load(shelf.steps()[-1] if step is None else step)
    blobs = _blobs(folder)

    def read(ref: BlobRef) -> bytes:
        return read_stored(blobs, ref)

    texts = tokenizer_files(folder / TOKENIZER_FOLDER)
    with _bar("writing", checkpoint.manifest.num_bytes) as advance:
        write_folder(directory, checkpoint, read, texts, advance)
    return checkpoint.manifest.step


# ---- how it looks ------------------------------------------------------------------------------


def _finished(works: Iterator[Work], what: str) -> Work:
    """Follow a node's work with a bar; its last word. Raises: SwarmError if there is none."""
    last: Work | None = None
    bar = _Bar(what)
    try:
        for last in works:
            bar.show(last.done_bytes, last.total_bytes)
    finally:
        bar.close()
    if last is None:
        raise SwarmError("the node broke off")
    return last


class _Bar:
    """A progress bar on stderr that appears only when the work takes a while."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._since_s = time.monotonic()
        self._progress: Progress | None = None

    def show(self, done: int, total: int) -> None:
        if self._progress is None:
            if time.monotonic() - self._since_s < BAR_AFTER_S:
                return
            console = Console(stderr=True)
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
                disable=not console.is_terminal,
            )
            self._progress.add_task(self._what, total=total)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=done, total=total)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar that is told how many more bytes are done."""
    bar, done = _Bar(what), 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        bar.show(done, total)

    try:
        yield advance
    finally:
        bar.close()


def _print_table(views: Sequence[CheckpointView]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    console.print(show.checkpoints_table(views))


def _print_audits(audits: Sequence[Audit]) -> None:
    for found in audits:
        for problem in found.problems:
            print(f"step {found.step}: {show.printable(problem)}")
        if not found.problems:
            print(f"step {found.step}: whole; weights sha256 {found.weights_sha256}")
