"""The journal of one job: append-only lines, each with its own checksum, fsynced one by one.

A line is `crc32 (8 hex digits) space JSON newline`. Reading stops at the first line that is
incomplete or damaged: a torn tail is what a crash leaves, and what was never acknowledged. Where
whole lines follow, they were acknowledged: then the file is damaged, and nobody goes on from it.
Lines that newer checkpoints made superfluous are folded into a few; these count for all of them, so
that the number of a line never changes.
"""

import dataclasses
import errno
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from swarmnode.coordinator.events import (
    BegunRecord,
    CheckpointRecord,
    CommitRecord,
    EvaluationRecord,
    HistoryRecord,
    Record,
    StartedRecord,
)
from swarmnode.errors import SwarmError
from swarmnode.failpoints import hit
from swarmnode.home import write_durably
from swarmnode.messages import (
    MAX_COMMITTED,
    MAX_ENTRY_BYTES,
)

NUM_KEPT_CHECKPOINTS = 2
"""Two, because a worker may be fetching the older one while the newer is written."""
FOLD_AT_LINES = 4 * MAX_COMMITTED
"""So many lines are folded, at the next checkpoint, down to what a catching-up worker may need."""
MAX_TOLD = 4096
"""Losses, and as many held-out ones, that one folded line tells: 0.3 MB where no digit is saved."""

_RECORDS: dict[str, type[Any]] = {kind.__name__: kind for kind in Record.__args__}
_ADAPTERS: dict[str, TypeAdapter[Any]] = {n: TypeAdapter(k) for n, k in _RECORDS.items()}
_BEGIN = re.compile(rb"[0-9a-f]{8} ")
"""What every line begins with."""


@dataclass(eq=False)
class JournalDamagedError(SwarmError):
    """A journal has lines that cannot be read, and not just a torn tail. Leave the file as it is or
    set it aside; do not go on from what comes before them: somebody may have the whole of it."""

    path: str
    number: int
    """Of the line in the file; the first is 1."""

    def __str__(self) -> str:
        return (
            f"line {self.number} of {self.path} is damaged or of a newer version, and no torn "
            "tail: the file is kept, and nothing goes on from it here"
        )


class Journal:
    """The records of one job, in one file."""

    def __init__(self, path: Path) -> None:
        """Open or create the journal; a torn tail is cut off, and what is left is on the disk: an
        earlier life may have ended between a line and its fsync. Older versions folded into one
        line, however long; it is cut into lines that fit a message.

        Raises: OSError, JournalDamagedError; the file is as it was then."""
        self._path = path
        rows = _whole_rows(path)
        whole = _in_pieces([record for record, _ in rows])
        if len(whole) > len(rows):
            write_durably(path, b"".join(map(_line, whole)))
            rows = list(_rows(path))
        self.found = [record for record, _ in rows]
        """What earlier lives wrote."""
        self._stops = [stop for _, stop in rows]
        """Where each line ends in the file."""
        self._numbers = _numbers(self.found)
        """How many lines there are up to the end of each."""
        self.checkpoints = [r for r in self.found if isinstance(r, CheckpointRecord)]
        """Every checkpoint since lines were last folded, the oldest first."""
        self._file = path.open("ab", buffering=0)
        self._file.truncate(self._whole_bytes)
        os.fsync(self._file.fileno())

    @property
    def num_lines(self) -> int:
        """Lines that were ever written, the folded ones included."""
        return self._numbers[-1] if self._numbers else 0

    @property
    def _whole_bytes(self) -> int:
        return self._stops[-1] if self._stops else 0

    def append(self, record: Record) -> None:
        """Write `record` and wait until the disk has it.

        Raises: OSError if it cannot; the journal is then as it was before.
        """
        line = _line(record)
        hit("before_journal", self.num_lines)
        hit(f"before_{type(record).__name__}")
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(self._whole_bytes)
            raise
        self._stops.append(self._whole_bytes + len(line))
        self._numbers.append(self.num_lines + 1)
        hit("after_journal", self.num_lines - 1)
        hit(f"after_{type(record).__name__}")
        if isinstance(record, CheckpointRecord):
            self.checkpoints.append(record)

    def lines(self, start: int) -> Iterator[tuple[int, bytes]]:
        """From line `start` on, in pieces that fit a message: (number of the first, the lines).

        Where `start` was folded away, all lines.
        """
        if start >= self.num_lines:
            return
        at = self._numbers.index(start) + 1 if start in self._numbers else 0
        with self._path.open("rb") as file:
            file.seek(self._stops[at - 1] if at else 0)
            held, first = b"", self._numbers[at - 1] if at else 0
            for index in range(at, len(self._stops)):
                line = file.readline()
                if held and len(held) + len(line) > MAX_ENTRY_BYTES:
                    yield first, held
                    held, first = b"", self._numbers[index - 1]
                held += line
            yield first, held

    def fold_if_long(self) -> None:
        """Rewrite the file without what no catching-up worker and no checkpoint needs any more.

        Raises: OSError, JournalDamagedError; the file is as it was then."""
        if len(self._stops) <= FOLD_AT_LINES:
            return
        folded = fold_file(self._path)
        lines = [_line(record) for record in folded]
        self._file.close()
        self._file = self._path.open("ab", buffering=0)
        self._stops = [sum(map(len, lines[: i + 1])) for i in range(len(lines))]
        self._numbers = _numbers(folded)
        self.checkpoints = [r for r in folded if isinstance(r, CheckpointRecord)]

    def close(self) -> None:
        self._file.close()


def fold_file(path: Path) -> list[Record]:
    """Fold a journal that nobody has open for writing, in one piece; its records then.

    Raises: OSError, JournalDamagedError; the file is as it was then.
    """
    folded = fold(read_whole_journal(path)[0])
    write_durably(path, b"".join(map(_line, folded)))
    hit("after_fold")
    return folded


def fold(records: Sequence[Record]) -> list[Record]:
    """The same journal, with all but the newest lines told by few."""
    kept_from = max(1, len(records) - MAX_COMMITTED)
    first_step = 0
    losses: list[float] = []
    validation: dict[int, float] = {}
    codec = ""
    plan: list[Record] = []
    checkpoints: list[Record] = []
    for record in records[1:kept_from]:
        match record:
            case HistoryRecord(_, begin, known, seen, codec):
                first_step = first_step if losses else begin
                losses.extend(known)
                validation.update(seen)
            case BegunRecord():
                plan = [*plan[:1], record]
            case StartedRecord(step=step):
                first_step = step if not losses else first_step
                del losses[step - first_step :]
                validation = {at: loss for at, loss in validation.items() if at <= step}
                plan = [record]
            case CommitRecord(step=step, loss=loss):
                del losses[step - first_step :]
                losses.append(loss)
            case EvaluationRecord(step, loss, codec):
                validation[step] = loss
            case CheckpointRecord():
                checkpoints.append(record)
    carried = [*plan, *checkpoints[-NUM_KEPT_CHECKPOINTS:]]
    num_lines = sum(_count(r) for r in records[1:kept_from]) - len(carried)
    told = HistoryRecord(
        num_lines, first_step, tuple(losses), tuple(sorted(validation.items())), codec
    )
    return _in_pieces([records[0], *carried, told, *records[kept_from:]])


def _in_pieces(records: Sequence[Record]) -> list[Record]:
    """The same records, none of which tells more than `MAX_TOLD` losses."""
    return [
        piece
        for record in records
        for piece in (_pieces(record) if isinstance(record, HistoryRecord) else (record,))
    ]


def _pieces(told: HistoryRecord) -> Iterator[HistoryRecord]:
    """Records that come to the same, in turn. A loss was told by a line of its own once: for that
    line it counts, and the first piece for all the others."""
    num_lines, step = told.num_lines - len(told.losses) - len(told.validation), told.first_step
    for start in range(0, max(1, len(told.losses), len(told.validation)), MAX_TOLD):
        losses = told.losses[start : start + MAX_TOLD]
        validation = told.validation[start : start + MAX_TOLD]
        num_lines += len(losses) + len(validation)
        yield HistoryRecord(num_lines, step, losses, validation, told.codec)
        num_lines, step = 0, step + len(losses)


def read_journal(path: Path) -> tuple[list[Record], int]:
    """The whole records of a journal, and the length in bytes up to the end of the last one."""
    rows = list(_rows(path))
    return [record for record, _ in rows], rows[-1][1] if rows else 0


def read_whole_journal(path: Path) -> tuple[list[Record], int]:
    """As `read_journal`, of a file whose tail may be torn, but that is not damaged otherwise.

    Raises: OSError, JournalDamagedError.
    """
    rows = _whole_rows(path)
    return [record for record, _ in rows], rows[-1][1] if rows else 0


def set_aside(path: Path) -> None:
    """Keep a damaged journal under another name: whole lines in it may be nowhere else."""
    names = (f"{path.name}.damaged-{number}" for number in itertools.count(1))
    path.replace(next(to for name in names if not (to := path.with_name(name)).exists()))


def count_lines(records: Sequence[Record]) -> int:
    """How many lines these stand for."""
    return sum(map(_count, records))


def parse_line(line: bytes) -> Record | None:
    """The record of one line, None if the line is torn, damaged or of another version."""
    if not _is_intact(line):
        return None
    try:
        body = json.loads(line[9:])
        record: Record = _ADAPTERS[body.pop("t")].validate_python(body)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return record


def _is_intact(line: bytes) -> bool:
    """Whether the line is as somebody wrote it, of whatever version."""
    crc, _, text = line.rstrip(b"\n").partition(b" ")
    return line.endswith(b"\n") and crc == b"%08x" % zlib.crc32(text)


def _line(record: Record) -> bytes:
    body = {"t": type(record).__name__, **dataclasses.asdict(record)}
    text = json.dumps(body, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _count(record: Record) -> int:
    return record.num_lines if isinstance(record, HistoryRecord) else 1


def _numbers(records: Sequence[Record]) -> list[int]:
    numbers: list[int] = []
    for record in records:
        numbers.append((numbers[-1] if numbers else 0) + _count(record))
    return numbers


def _whole_rows(path: Path) -> list[tuple[Record, int]]:
    """As `_rows`. Raises: JournalDamagedError if something intact follows."""
    rows = list(_rows(path))
    if path.exists():
        with path.open("rb") as file:
            file.seek(rows[-1][1] if rows else 0)
            for line in file:  # behind a damaged newline an intact line is part of another
                begins = (found.start() for found in _BEGIN.finditer(line))
                if any(_is_intact(line[begin:]) for begin in begins):
                    raise JournalDamagedError(str(path), len(rows) + 1)
    return rows


def _rows(path: Path) -> Iterator[tuple[Record, int]]:
    """Each whole record, and where its line ends."""
    if not path.exists():
        return
    stop = 0
    with path.open("rb") as file:
        for line in file:
            record = parse_line(line)
            if record is None:
                return
            stop += len(line)
            yield record, stop
