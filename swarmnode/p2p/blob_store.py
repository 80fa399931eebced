"""Content by its hash, in a directory: chunks of data, weights and checkpoints.

Layout: `aa/<sha256>` one file per blob, `aa` its first two digits; `borrowed/<sha256>` what will
become a piece of some other file and then go; `partial/` what is being written. A blob appears
under its name complete or not at all. Pieces of other files count as blobs too, without a copy, as
long as the store lives.
"""

import hashlib
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from swarmnode.domain import BlobRef
from swarmnode.errors import ChunkError, SwarmError
from swarmnode.home import make_folder, sync_folder
from swarmnode.wire import MAX_BLOB_BYTES

BORROWED_S = 7 * 86400.0
"""What was borrowed in an earlier life and is not asked for again goes after so long."""
_HASH = re.compile(r"[0-9a-f]{64}")


class Range(NamedTuple):
    """A blob that is a piece of a file which belongs to somebody else."""

    ref: BlobRef
    path: Path
    offset: int


def blob_path(root: Path, ref: BlobRef) -> Path:
    """Where the store in `root` keeps its own copy of the blob, for those who only read.

    Raises: ChunkError unless the name is a hash; nothing else ever becomes a path.
    """
    if not _HASH.fullmatch(ref.sha256) or not 0 <= ref.num_bytes <= MAX_BLOB_BYTES:
        raise ChunkError(f"{ref.sha256!r:.80} of {ref.num_bytes!r:.20} bytes names no blob")
    return root / ref.sha256[:2] / ref.sha256


class BlobStore:
    """A content-addressed store in `root`. Safe to use from several threads.

    Several processes may read; one (the daemon) opens it, which removes what an earlier life
    left half-written; `scratch` is the folder where that lives. With `durable` every blob that is
    not just borrowed is on the disk before `put` or `own` returns.
    Raises: SwarmError if the directory cannot be made or written.
    """

    def __init__(self, root: Path, *, durable: bool = False) -> None:
        self.root = root
        self._durable = durable
        self.scratch = root / "partial"
        self._borrowed = root / "borrowed"
        self._lock = threading.Lock()
        self._folders = threading.Lock()
        """Held while one is made; never where the event loop waits."""
        self._ranges: dict[str, list[Range]] = {}
        """The same content may lie in several files: it is here as long as one of them is."""
        self._files: dict[Path, set[str]] = {}
        """Of each file the contents that were added of it."""
        self._sound: dict[str, tuple[int, int, int]] = {}
        """How own files looked when they were written, or found sound, in this life."""
        try:
            for folder in (self.scratch, self._borrowed):
                folder.mkdir(parents=True, exist_ok=True)
            if durable:  # folders that an earlier life made, and did not live to sync
                sync_folder(root)
            oldest_s = time.time() - BORROWED_S
            for leftover in (*self.scratch.iterdir(), *self._borrowed.iterdir()):
                if leftover.parent == self.scratch or leftover.stat().st_mtime < oldest_s:
                    leftover.unlink()
        except OSError as error:
            raise SwarmError(f"blob store {root} cannot be used: {error.strerror}") from error

    # ---- writing ----

    def put(self, data: bytes | bytearray | memoryview, *, is_borrowed: bool = False) -> BlobRef:
        """Store `data`; nothing happens if it is there already. At most `MAX_BLOB_BYTES`.

        What is only borrowed, to become a piece of something else, goes again with `give_back`;
        of what is put or owned for good meanwhile the store has its own.

        Raises: SwarmError if the disk is full or broken; nothing half-written is left.
        """
        num_bytes = memoryview(data).nbytes
        if num_bytes > MAX_BLOB_BYTES:
            raise SwarmError(f"blob of {num_bytes} bytes; at most {MAX_BLOB_BYTES} are allowed")
        ref = BlobRef(hashlib.sha256(data).hexdigest(), num_bytes)
        own, borrowed = self._own_path(ref), self._borrowed_path(ref)
        if _holds(own, data) or (is_borrowed and _holds(borrowed, data)):
            return ref
        self._write(borrowed if is_borrowed else own, data)
        if not is_borrowed:
            self._sync([own])
        return ref

    def give_back(self, refs: Iterable[BlobRef]) -> None:
        """Remove those of `refs` that were borrowed."""
        for ref in refs:
            self._delete(self._borrowed_path(ref))

    def own(self, refs: Iterable[BlobRef]) -> None:
        """See that every blob stays, also what is borrowed, or a piece of somebody's file.

        All at once: a disk makes a hundred files safe in little more time than one.
        Raises: ChunkError if one is not here, SwarmError if the disk is full; then nothing is
        owned that was not before.
        """
        paths, new = [], []
        try:
            for ref in refs:
                paths.append(path := self._own_path(ref))
                if _size(path) != ref.num_bytes:
                    new.append(path)
                    self._take(ref, path)
            self._sync(paths)
        except SwarmError:
            for path in new:
                self._delete(path)
            raise

    def _take(self, ref: BlobRef, path: Path) -> None:
        """Make the store's own file of a blob; a link to what is borrowed costs no copy."""
        data = self.read(ref)
        try:
            self._make_folder(path.parent)
            os.link(self._borrowed_path(ref), path)
        except OSError:  # it is not borrowed, or the file system has no links
            self._write(path, data)

    def add_ranges(self, ranges: Iterable[Range]) -> None:
        """Serve pieces of existing files as blobs, without a copy, for this life of the store.

        A file must stay as it is: `read` checks the hash, and a changed piece is gone.
        """
        with self._lock:
            for piece in ranges:
                known = self._ranges.setdefault(piece.ref.sha256, [])
                if piece not in known:
                    known.append(piece)
                self._files.setdefault(piece.path, set()).add(piece.ref.sha256)

    def drop_ranges(self, path: Path) -> None:
        """Forget every piece of the file `path`; the file itself is left alone."""
        with self._lock:
            for sha256 in self._files.pop(path, ()):
                pieces = [piece for piece in self._ranges.get(sha256, ()) if piece.path == path]
                self._forget(sha256, pieces)

    def remove(self, ref: BlobRef) -> None:
        """Delete the store's own copy of the blob; pieces of others' files are theirs to drop."""
        self._delete(self._own_path(ref))

    # ---- reading ----

    def has(self, ref: BlobRef) -> bool:
        """Whether the blob is here, by name and size; `read` also checks the content."""
        files = (self._own_path(ref), self._borrowed_path(ref))
        return any(_size(path) == ref.num_bytes for path in files) or any(
            piece.path.is_file() for piece in self._pieces(ref)
        )

    def read(self, ref: BlobRef) -> bytes:
        """The content, checked against its hash, from the first place that still has it.

        Raises: ChunkError if it is not here, or is corrupt; then it is removed, so that it
        will be fetched again.
        """
        files = (self._own_path(ref), self._borrowed_path(ref))
        failure = f"blob {ref.sha256:.12} is not here"
        for piece in (*(Range(ref, path, 0) for path in files), *self._pieces(ref)):
            is_file, look = piece.path in files, _look(piece.path)
            try:
                data = _read_piece(piece, is_whole=is_file)
            except FileNotFoundError:
                continue
            except OSError as error:
                failure = f"blob {ref.sha256:.12} cannot be read: {error.strerror}"
                continue
            if hashlib.sha256(data).hexdigest() == ref.sha256:
                if is_file:
                    self._sound[ref.sha256] = look
                return data
            failure = f"blob {ref.sha256:.12} was corrupt on disk and is removed"
            if is_file:
                self._delete(piece.path)
            else:
                with self._lock:
                    self._forget(ref.sha256, [piece])
        raise ChunkError(failure)

    def is_sound(self, ref: BlobRef) -> bool:
        """Whether the blob is here, by content; what is damaged is removed, as by `read`.

        A file of the store's own that was written or read in this life is not read again, unless
        somebody has touched it since.
        """
        try:
            looks = (_look(path) for path in (self._own_path(ref), self._borrowed_path(ref)))
            if any(
                look[0] == ref.num_bytes and look == self._sound.get(ref.sha256) for look in looks
            ):
                return True
            self.read(ref)
        except ChunkError:
            return False
        return True

    # ---- inside ----

    def _pieces(self, ref: BlobRef) -> list[Range]:
        """The pieces of others' files that are this blob."""
        with self._lock:
            return [piece for piece in self._ranges.get(ref.sha256, ()) if piece.ref == ref]

    def _forget(self, sha256: str, pieces: list[Range]) -> None:
        """Drop these pieces; with the lock held."""
        left = [piece for piece in self._ranges.get(sha256, ()) if piece not in pieces]
        if left:
            self._ranges[sha256] = left
        else:
            self._ranges.pop(sha256, None)

    def _own_path(self, ref: BlobRef) -> Path:
        return blob_path(self.root, ref)

    def _borrowed_path(self, ref: BlobRef) -> Path:
        return self._borrowed / self._own_path(ref).name

    def _delete(self, path: Path) -> None:
        """Remove an own file, if it is there, and what is known of it."""
        self._sound.pop(path.name, None)
        path.unlink(missing_ok=True)

    def _make_folder(self, path: Path) -> None:
        """Have the folder of an own file; no thread goes on before its name is on the disk."""
        if self._durable:
            with self._folders:
                make_folder(path)
        else:
            path.mkdir(exist_ok=True)

    def _write(self, path: Path, data: bytes | bytearray | memoryview) -> None:
        """Write `path` through a temporary file and a rename; `_sync` makes it outlast a crash."""
        partial: str | None = None
        try:
            self._make_folder(path.parent)
            descriptor, partial = tempfile.mkstemp(dir=self.scratch)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            then_s = time.time() - 1.0  # whoever writes to it leaves another time, by any clock
            os.utime(partial, (then_s, then_s))
            look = _look(Path(partial))
            os.replace(partial, path)
            partial = None
            self._sound[path.name] = look
        except OSError as error:
            raise self._full(memoryview(data).nbytes, error) from error
        finally:
            if partial is not None:
                Path(partial).unlink(missing_ok=True)

    def _sync(self, paths: Sequence[Path]) -> None:
        """Have own files on the disk, and their names."""
        if not self._durable:
            return
        try:
            for path in (*paths, *{path.parent for path in paths}):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        except OSError as error:
            raise self._full(sum(map(_size, paths)), error) from error

    def _full(self, num_bytes: int, error: OSError) -> SwarmError:
        return SwarmError(
            f"cannot store {num_bytes} bytes in {self.root}: {error.strerror}; free some space"
        )


def _read_piece(piece: Range, *, is_whole: bool) -> bytes:
    """The bytes of a piece; none if it should be the `is_whole` file and is not.

    Raises: OSError.
    """
    with piece.path.open("rb") as file:
        if is_whole and os.fstat(file.fileno()).st_size != piece.ref.num_bytes:
            return b""
        file.seek(piece.offset)
        return file.read(piece.ref.num_bytes)


def _holds(path: Path, data: bytes | bytearray | memoryview) -> bool:
    """Whether a file has exactly this content."""
    return _size(path) == memoryview(data).nbytes and path.read_bytes() == data


def _size(path: Path) -> int:
    """The size of a file, -1 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _look(path: Path) -> tuple[int, int, int]:
    """Size, number and time of a file, others once it is written to; -1 if there is none."""
    try:
        found = path.stat()
    except OSError:
        return (-1, -1, -1)
    return (found.st_size, found.st_ino, found.st_mtime_ns)
