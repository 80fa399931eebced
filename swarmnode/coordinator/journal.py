"""The journal of one job: append-only lines, each with its own checksum, fsynced one by one.

A line is `crc32 (8 hex digits) space JSON newline`. Reading stops at the first line that is
incomplete or damaged: a torn tail is what a crash leaves, and what was never acknowledged.
"""

import dataclasses
import errno
import json
import os
import zlib
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from swarmnode.coordinator.events import CheckpointRecord, Record

_RECORDS: dict[str, type[Any]] = {kind.__name__: kind for kind in Record.__args__}
_ADAPTERS: dict[str, TypeAdapter[Any]] = {n: TypeAdapter(k) for n, k in _RECORDS.items()}


class Journal:
    """The records of one job, in one file."""

    def __init__(self, path: Path) -> None:
        """Open or create the journal; a torn tail is cut off. Raises: OSError."""
        self._path = path
        self.found, self._whole_bytes = read_journal(path)
        """What earlier lives wrote."""
        self.checkpoints = [r for r in self.found if isinstance(r, CheckpointRecord)]
        """Every checkpoint so far, the oldest first."""
        self._file = path.open("ab", buffering=0)
        self._file.truncate(self._whole_bytes)

    def append(self, record: Record) -> None:
        """Write `record` and wait until the disk has it.

        Raises: OSError if it cannot; the journal is then as it was before.
        """
        body = {"t": type(record).__name__, **dataclasses.asdict(record)}
        text = json.dumps(body, separators=(",", ":")).encode()
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(self._whole_bytes)
            raise
        self._whole_bytes += len(line)
        if isinstance(record, CheckpointRecord):
            self.checkpoints.append(record)

    def close(self) -> None:
        self._file.close()


def read_journal(path: Path) -> tuple[list[Record], int]:
    """The whole records of a journal, and the length in bytes up to the end of the last one."""
    records: list[Record] = []
    whole_bytes = 0
    if not path.exists():
        return records, 0
    with path.open("rb") as file:
        for line in file:
            crc, _, text = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text):
                break
            body = json.loads(text)
            name = body.pop("t")
            records.append(_ADAPTERS[name].validate_python(body))
            whole_bytes += len(line)
    return records, whole_bytes
