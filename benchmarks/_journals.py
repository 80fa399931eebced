"""Reads the journals of a swarm again and again: what was committed stays committed, once."""

import os
from collections.abc import Sequence
from pathlib import Path

from swarmnode.coordinator.events import (
    BegunRecord,
    CommitRecord,
    HistoryRecord,
    Record,
    StartedRecord,
)
from swarmnode.coordinator.journal import parse_line

_Content = tuple[float, tuple[object, ...]]
"""Clip scale, and the hashes of the stages' updates. The loss is left out: who finishes a step for
a coordinator that died knows only the losses of those who still answer."""


class Witness:
    """Every commit of one job that any node ever journaled, and what is wrong with them.

    A journal must go on where it was: steps one by one, each plan at the step where the one before
    stopped. A step in two journals must be the same bits (the job is deterministic). Lines fold
    into one after 1024 newer ones at the earliest; look more often than that.
    """

    def __init__(self, journals: Sequence[Path]) -> None:
        self._journals = tuple(journals)
        self._read: dict[Path, tuple[int, int]] = {}
        """path -> (inode, bytes that were read)."""
        self._next: dict[Path, int] = {}
        """path -> the step that its next commit must be of."""
        self._contents: dict[int, _Content] = {}
        self.faults: list[str] = []
        self._plans: dict[int, StartedRecord] = {}
        self._begun = 0

    @property
    def num_steps(self) -> int:
        return len(self._contents)

    @property
    def generation(self) -> int:
        """The highest of any plan."""
        return max(self._plans, default=0)

    @property
    def plans(self) -> tuple[StartedRecord, ...]:
        """The newest plan, and the newest that is known to have begun, if that is another one."""
        kept = sorted({self._begun, self.generation} & self._plans.keys())
        return tuple(self._plans[generation] for generation in kept)

    def look(self) -> None:
        """Read what is new in every journal."""
        for path in self._journals:
            if path.exists():
                for record in self._fresh(path):
                    self._see(path, record)

    def verdict(self, last: Path) -> list[str]:
        """What is wrong in the end; `last` is the journal of whoever coordinates."""
        self.look()
        lost = sorted(set(range(max(self._contents, default=-1) + 1)) - self._contents.keys())
        faults = list(self.faults)
        if lost:
            faults.append(f"{len(lost)} steps were never seen, the first is {lost[0]}")
        if self._next.get(last) != self.num_steps:
            faults.append(
                f"{self.num_steps} steps seen, the last journal has {self._next.get(last)}"
            )
        return faults

    def _see(self, path: Path, record: Record) -> None:
        due = self._next.get(path)
        where = f"{path.parent.parent.parent.name} generation {self.generation}"
        match record:
            case HistoryRecord(first_step=first, losses=losses):
                self._next[path] = first + len(losses)
            case BegunRecord(generation):
                self._begun = max(self._begun, generation)
            case StartedRecord(step=step, generation=generation):
                self._plans[generation] = record
                if due is not None and step != due:
                    self.faults.append(f"{where}: a plan begins at step {step}, not at {due}")
                self._next[path] = step
            case CommitRecord(step=step):
                if due is not None and step != due:
                    self.faults.append(f"{where}: step {step} is committed, not {due}")
                self._next[path] = step + 1
                content = (record.scale, record.updates)
                if self._contents.setdefault(step, content) != content:
                    self.faults.append(f"{where}: step {step} was committed with other bits before")

    def _fresh(self, path: Path) -> list[Record]:
        """The records since the last look; all of them if the file is another one."""
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            inode, offset = self._read.get(path, (status.st_ino, 0))
            if inode != status.st_ino or status.st_size < offset:
                offset = 0
            if offset == 0:
                self._next.pop(path, None)
            file.seek(offset)
            records = []
            for line in file:
                record = parse_line(line)
                if record is None:  # still being written
                    break
                offset += len(line)
                records.append(record)
            self._read[path] = (status.st_ino, offset)
            return records
