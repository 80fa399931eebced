"""What a node keeps of jobs that others coordinate, so that it can take over: their journals."""

import contextlib
import os
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from swarmnode.coordinator.events import CheckpointRecord, EndRecord, Record, StartedRecord
from swarmnode.coordinator.journal import (
    FOLD_AT_LINES,
    JournalDamagedError,
    count_lines,
    fold_file,
    parse_line,
    read_journal,
    read_whole_journal,
    set_aside,
)
from swarmnode.domain import JobId

JOURNAL_FILE = "journal"
MAX_JOURNAL_BYTES = 512 << 20
"""Of one journal. That of a million steps, folded at checkpoints, comes to 30 MB, and to 200 MB
with an evaluation after each step and 256 stages; never folded, with 8 stages, to 950 MB."""


class StandbyJournals:
    """Copies of journals, one folder for each job.

    A coordinator that begins to tell its journal again, from line 0, fills a second copy; that
    one takes the first one's place once it is of a later generation, or of the same and as long:
    nothing is forgotten on the way. Long copies are folded at a checkpoint, as the journal itself.
    A damaged copy is set aside: it counts for nothing until the journal is told again.
    May be used in any thread: what is done to one copy is done in turn.
    Raises: OSError where the disk is full or broken.
    """

    def __init__(self, directory: Path, log: Callable[..., None] = lambda *_, **__: None) -> None:
        self._directory = directory
        self._log = log
        self._counts: dict[Path, int] = {}
        """Lines that a copy tells of, the folded ones included."""
        self._lengths: dict[Path, int] = {}
        """Lines that are in its file."""
        self._newest: dict[JobId, CheckpointRecord | None] = {}
        self._locks: defaultdict[JobId, threading.RLock] = defaultdict(threading.RLock)

    def path(self, job: JobId) -> Path:
        return self._directory / job / JOURNAL_FILE

    def num_lines(self, job: JobId) -> int:
        """Lines that are known of the job's journal."""
        with self._locks[job]:
            return self._count(self.path(job))

    def take(self, job: JobId, number: int, lines: bytes) -> list[Record]:
        """Append `lines`, of which the first is line `number`; what they say.

        Lines that do not follow on what is here, are damaged, or would make the copy longer than
        MAX_JOURNAL_BYTES, are left out.
        """
        with self._locks[job]:
            return self._take(job, number, lines)

    def _take(self, job: JobId, number: int, lines: bytes) -> list[Record]:
        rows = lines.splitlines(keepends=True)
        records = [record for record in map(parse_line, rows) if record is not None]
        if len(records) != len(rows) or not rows:
            return []
        path = self.path(job)
        again = path.with_name("journal.again")
        if number == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            again.unlink(missing_ok=True)
            self._counts[again] = self._lengths[again] = 0
        is_again = number == 0 or (again.exists() and number == self._count(again))
        target = again if is_again else path  # the first copy goes on if line 0 only came twice
        if number != self._count(target):
            return []
        whole_bytes = target.stat().st_size if target.exists() else 0
        if whole_bytes + len(lines) > MAX_JOURNAL_BYTES:
            return []
        try:
            with target.open("ab") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):  # or what comes next would follow a torn line
                os.truncate(target, whole_bytes)
            raise
        self._counts[target] = number + count_lines(records)
        self._lengths[target] += len(records)
        if target == again and self._recency(again) >= self._recency(path):
            again.replace(path)
            self._counts[path] = self._counts.pop(again)
            self._lengths[path] = self._lengths.pop(again)
        told = [record for record in records if isinstance(record, CheckpointRecord)]
        if told:
            self._newest[job] = told[-1]
        if told and self._lengths.get(path, 0) > FOLD_AT_LINES:
            try:
                self._lengths[path] = len(fold_file(path))
            except JournalDamagedError as error:
                self._set_aside(path, error)
        return records

    def checkpoints(self) -> dict[JobId, list[CheckpointRecord]]:
        """Of each job the checkpoints that its journal tells of, the oldest first."""
        found = {}
        for path in self._directory.glob(f"*/{JOURNAL_FILE}"):
            with contextlib.suppress(OSError):  # this journal cannot be read: the others can
                records = read_journal(path)[0]
                told = [record for record in records if isinstance(record, CheckpointRecord)]
                found[JobId(path.parent.name)] = told
        return found

    def newest_checkpoint(self, job: JobId) -> CheckpointRecord | None:
        """The one that the job's journal told of last."""
        if job not in self._newest:
            records, _ = read_journal(self.path(job))
            told = [record for record in records if isinstance(record, CheckpointRecord)]
            self._newest.setdefault(job, told[-1] if told else None)
        return self._newest[job]

    def unchanged_since(self, then_s: float) -> list[JobId]:
        """Jobs of whose journals nothing was written since `then_s` on the wall clock."""
        found = []
        for folder in sorted(self._directory.glob("*/")):
            with contextlib.suppress(OSError):
                times = [path.stat().st_mtime for path in (folder, *folder.iterdir())]
                if max(times) < then_s:
                    found.append(JobId(folder.name))
        return found

    def ended(self) -> list[JobId]:
        """Jobs whose journals say that they are over."""
        found = []
        for path in sorted(self._directory.glob(f"*/{JOURNAL_FILE}")):
            with contextlib.suppress(OSError):
                if any(isinstance(record, EndRecord) for record in read_journal(path)[0][-1:]):
                    found.append(JobId(path.parent.name))
        return found

    def drop(self, job: JobId) -> None:
        """The job is over, or somebody else's."""
        folder = self._directory / job
        with self._locks[job]:
            if not folder.exists():
                return
            for path in folder.iterdir():
                self._counts.pop(path, None)
                self._lengths.pop(path, None)
                path.unlink()
            folder.rmdir()
            self._newest.pop(job, None)

    def _count(self, path: Path) -> int:
        if path not in self._counts:
            try:
                records, whole_bytes = read_whole_journal(path)
            except JournalDamagedError as error:
                self._set_aside(path, error)
                return 0
            if path.exists():
                with path.open("r+b") as file:  # an earlier life may have left a torn tail, and
                    file.truncate(whole_bytes)  # lines that were not on the disk yet
                    os.fsync(file.fileno())
            self._counts[path], self._lengths[path] = count_lines(records), len(records)
        return self._counts[path]

    def _set_aside(self, path: Path, error: JournalDamagedError) -> None:
        set_aside(path)
        self._log("copy of a journal set aside", reason=str(error))
        self._counts[path] = self._lengths[path] = 0

    def _recency(self, path: Path) -> tuple[int, int]:
        """(generation, lines): of two copies the one with more of it knows better."""
        try:
            records, _ = read_whole_journal(path)
        except JournalDamagedError as error:
            self._set_aside(path, error)
            return 0, 0
        begun = [record.generation for record in records if isinstance(record, StartedRecord)]
        return max(begun, default=0), count_lines(records)
