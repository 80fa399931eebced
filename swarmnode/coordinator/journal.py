"""The journal of one job: append-only lines, each with its own checksum, fsynced one by one.

A line is `crc32 (8 hex digits) space JSON newline`. Reading stops at the first line that is
incomplete or damaged: a torn tail is what a crash leaves, and what was never acknowledged.
"""

import dataclasses
import json
import os
import zlib
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from swarmnode.coordinator.events import Record

_RECORDS: dict[str, type[Any]] = {kind.__name__: kind for kind in Record.__args__}
_ADAPTERS: dict[str, TypeAdapter[Any]] = {n: TypeAdapter(k) for n, k in _RECORDS.items()}


class Journal:
    """The records of one job, in one file."""

    def __init__(self, path: Path) -> None:
        """Open or create the journal; a torn tail is cut off."""
        self._path = path
        self.records, whole_bytes = read_journal(path)
        self._file = path.open("ab")
        if self._file.tell() != whole_bytes:
            self._file.truncate(whole_bytes)

    def append(self, record: Record) -> None:
        """Write `record` and wait until the disk has it. Raises: OSError if it cannot."""
        start = self._file.tell()
        body = {"t": type(record).__name__, **dataclasses.asdict(record)}
        text = json.dumps(body, separators=(",", ":")).encode()
        try:
            self._file.write(b"%08x %s\n" % (zlib.crc32(text), text))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(start)
            raise
        self.records.append(record)

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
