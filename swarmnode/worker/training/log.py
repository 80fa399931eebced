"""The update log of one stage: what every committed step has done, on the disk of its holder.

Files: `<step>.update`, the bytes as they were broadcast, and `<step>.index`, their UpdateIndex.
The index is named last, so an index with a fitting update beside it is a whole entry. Also there:
`<slot>.ready`, the last thing that a slot said of an update, behind its CRC-32.
"""

import os
import secrets
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from swarmnode.domain import BlobRef
from swarmnode.errors import DataError, ProtocolError
from swarmnode.home import sync_folder
from swarmnode.p2p.blob_store import Range
from swarmnode.updates import UpdateIndex, index_update
from swarmnode.wire import MAX_BLOB_BYTES

Payload = bytes | bytearray | memoryview
_READ_BYTES = 1 << 20
_SUFFIXES = (".update", ".index")
_READY = ".ready"


class UpdateLog:
    """The entries of one stage in one directory. One process writes; others may read.

    With `durable` an entry is on the disk before `write` returns; without it, it survives the
    end of the process, but not of the machine.
    """

    def __init__(self, directory: Path, *, durable: bool = True) -> None:
        self.directory = directory
        self._durable = durable
        self._is_named = not durable
        """Whether the folder's own name is on the disk, whoever made it."""

    def write(self, step: int, payloads: Sequence[Payload]) -> BlobRef:
        """Store the update of `step`, in place of an earlier one; the name of its index.

        Raises: DataError if the disk is full or broken: no entry of that step is left.
        """
        index = index_update(step, payloads)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.index_path(step).unlink(missing_ok=True)
            self._put(self.update_path(step), payloads)
            self._put(self.index_path(step), [index.to_json()])
            if self._durable:
                sync_folder(self.directory)
            if not self._is_named:
                sync_folder(self.directory.parent)
                self._is_named = True
        except OSError as error:
            raise DataError(
                f"cannot log step {step} in {self.directory}: {error.strerror}; free some space"
            ) from error
        return index.ref

    def read_index(self, step: int) -> UpdateIndex:
        """The index of an entry, as it was written. Raises: DataError if there is none."""
        path = self.index_path(step)
        try:
            with path.open("rb") as file:
                index = UpdateIndex.from_json(file.read(MAX_BLOB_BYTES + 1))
        except (OSError, ProtocolError) as error:
            raise DataError(f"{path} cannot be used: {error}") from error
        if index.step != step:
            raise DataError(f"{path} is the index of step {index.step}")
        return index

    def inventory(self) -> dict[int, BlobRef]:
        """What is whole of the log after a restart: the newest steps without a gap.

        Every byte is read and checked. Whatever is torn, damaged or before a gap is removed.
        """
        if not self.directory.is_dir():
            return {}
        whole: dict[int, BlobRef] = {}
        for step in self._steps():
            try:
                index = self.read_index(step)
                if self._content(step) == index:
                    whole[step] = index.ref
            except (DataError, OSError):
                continue
        kept = newest_run(whole)
        self.delete(step for step in self._steps() if step not in kept)
        for path in self.directory.glob("*.partial"):
            if {*_SUFFIXES, _READY} & set(path.suffixes):
                path.unlink(missing_ok=True)
        return {step: whole[step] for step in kept}

    def delete(self, steps: Iterable[int]) -> None:
        """Remove the entries of `steps`, the index first; those that are not there are left out."""
        for step in steps:
            self.index_path(step).unlink(missing_ok=True)
            self.update_path(step).unlink(missing_ok=True)

    def ranges(self, step: int) -> list[Range]:
        """The entry as blobs: its index, and its chunks. Raises: DataError if there is none."""
        index = self.read_index(step)
        found = [Range(index.ref, self.index_path(step), 0)]
        offset = 0
        for chunk in index.chunks:
            found.append(Range(chunk, self.update_path(step), offset))
            offset += chunk.num_bytes
        return found

    def write_ready(self, slot: int, said: bytes) -> None:
        """Store what a slot says, in place of what it said before. Raises: DataError."""
        path = self.directory / f"{slot}{_READY}"
        try:
            self._put(path, [b"%08x" % zlib.crc32(said), said])
            if self._durable:
                sync_folder(self.directory)
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}; free some space") from error

    def readies(self) -> list[bytes]:
        """What the slots said last; what is damaged is left out. Raises: OSError."""
        found = []
        for path in sorted(self.directory.glob(f"*{_READY}")):
            data = path.read_bytes()
            if data[:8] == b"%08x" % zlib.crc32(data[8:]):
                found.append(data[8:])
        return found

    def forget_readies(self) -> None:
        """What was said is no longer of use."""
        for path in list(self.directory.glob(f"*{_READY}")):
            path.unlink(missing_ok=True)

    def update_path(self, step: int) -> Path:
        return self.directory / f"{step}.update"

    def index_path(self, step: int) -> Path:
        return self.directory / f"{step}.index"

    def _steps(self) -> list[int]:
        files = (path for path in self.directory.iterdir() if path.suffix in _SUFFIXES)
        return sorted({int(path.stem) for path in files if path.stem.isdecimal()})

    def _content(self, step: int) -> UpdateIndex:
        with self.update_path(step).open("rb") as file:
            return index_update(step, iter(lambda: file.read(_READ_BYTES), b""))

    def _put(self, path: Path, payloads: Sequence[Payload]) -> None:
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
        try:
            with partial.open("wb") as file:
                for payload in payloads:
                    file.write(payload)
                file.flush()
                if self._durable:
                    os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def newest_run(entries: Mapping[int, object] | Iterable[int]) -> list[int]:
    """The newest steps that follow each other without a gap, in order."""
    run: list[int] = []
    for step in sorted(entries, reverse=True):
        if run and step != run[-1] - 1:
            break
        run.append(step)
    return run[::-1]
