"""The real journal's lines on a simulated disk."""

import dataclasses
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from swarmnode.coordinator.events import Record
from swarmnode.coordinator.journal import read_journal
from swarmnode.simulation.disk import Disk
from swarmnode.simulation.paths import SimPath
from swarmnode.simulation.world import Script


class SimJournal:
    """Append, wait for the disk, cut off what was not written whole: as `journal.Journal`."""

    def __init__(self, disk: Disk, path: str) -> None:
        self._disk, self._path = disk, path
        found, num_bytes = read_journal(cast(Path, SimPath(disk, path)))
        self.found: list[Record] = list(found)
        if path in disk:
            disk.truncate(path, num_bytes)
            disk.settle(path)
        self._whole_bytes = num_bytes
        self.num_lines = len(self.found)

    def append(self, record: Record) -> Script:
        """Raises: OSError; the journal is then as it was before."""
        line = encode_line(record)
        try:
            self._disk.append(self._path, line)
            yield self._disk.sync_s
            self._disk.sync(self._path)
        except OSError:
            self._disk.truncate(self._path, self._whole_bytes)
            raise
        self._whole_bytes += len(line)
        self.num_lines += 1

    def lines(self, start: int) -> Iterator[tuple[int, bytes]]:
        """From line `start` on: (number of the first, the lines)."""
        lines = self._disk.read(self._path)[: self._whole_bytes].splitlines(keepends=True)
        if start < self.num_lines:
            yield start, b"".join(lines[start : self.num_lines])


def encode_line(record: Record) -> bytes:
    body = {"t": type(record).__name__, **dataclasses.asdict(record)}
    text = json.dumps(body, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)
