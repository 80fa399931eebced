"""Checkpoints on disk: a shelf of manifests beside a blob store, and folders that stand alone.

A folder holds `manifest.json`, `atoms-00000.safetensors` and so on, `config.json` and the
tokenizer's files. It appears under its name complete and flushed, or not at all.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from swarmnode.domain import BlobRef
from swarmnode.errors import BusyError, ChunkError, DataError, NotFoundError, SwarmError
from swarmnode.p2p.blob_store import Range, blob_path
from swarmnode.p2p.checkpoints import MAX_MANIFEST_BYTES, Checkpoint, WeightsHash
from swarmnode.p2p.states import MOMENT_SUFFIXES, IndexedTensor, write_safetensors
from swarmnode.tensorfiles import TensorSpan, read_header
from swarmnode.wire import CHUNK_BYTES

MANIFEST_FILE = "manifest.json"
CONFIG_FILE = "config.json"
SHELF_FOLDER = "checkpoints"
GROUP_BYTES = 64 << 20
"""Atoms are grouped into files of about this size; those of one weight stay together."""
MAX_PROBLEMS = 20

OnBytes = Callable[[int], None]
"""Told how many more bytes are done. May raise to end the work."""


def no_progress(_num_bytes: int) -> None:
    """Tell nobody."""


class Shelf:
    """The manifests of one job's checkpoints: `<folder>/<step>.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> tuple[int, ...]:
        """Steps of which there is a manifest, the oldest first."""
        found = (path.stem for path in self.folder.glob("*.json"))
        return tuple(sorted(int(stem) for stem in found if stem.isdecimal()))

    def path(self, step: int) -> Path:
        return self.folder / f"{step}.json"

    def load(self, step: int) -> Checkpoint:
        """Raises: NotFoundError if there is none, DataError if it cannot be one."""
        if step not in self.steps():
            known = ", ".join(map(str, self.steps()))
            raise NotFoundError(f"no checkpoint after step {step}; there are: {known or 'none'}")
        return read_checkpoint(self.path(step))

    def add(self, checkpoint: Checkpoint) -> None:
        """Write a manifest so that it is there completely or not at all. Raises: OSError."""
        self.folder.mkdir(exist_ok=True)
        path = self.path(checkpoint.manifest.step)
        partial = path.with_suffix(".partial")
        try:
            _write(partial, checkpoint.to_bytes())
            partial.replace(path)
            sync_folder(self.folder)
        finally:
            partial.unlink(missing_ok=True)

    def keep_only(self, steps: Iterable[int]) -> None:
        for step in set(self.steps()) - set(steps):
            self.path(step).unlink(missing_ok=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a manifest file; its size is known before it is read. Raises: DataError."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_MANIFEST_BYTES:
                raise DataError(f"{path} is over {MAX_MANIFEST_BYTES >> 20} MiB")
            return Checkpoint.parse(file.read(size))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; is it a checkpoint?") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


# ---- where the chunks are ----------------------------------------------------------------------


class Chunks(Protocol):
    """Gives the chunks of atoms as they lie on the disk, without a look at their hash."""

    def read(self, atom: IndexedTensor, number: int) -> bytes:
        """At most the chunk's announced size. Raises: ChunkError if there is nothing."""


class StoredChunks:
    """Chunks in the folder of a blob store; nothing there is changed."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, atom: IndexedTensor, number: int) -> bytes:
        ref = atom.chunks[number]
        return _read_piece(blob_path(self._root, ref), 0, ref.num_bytes, whole=True)


def read_stored(root: Path, ref: BlobRef) -> bytes:
    """A blob of the store in `root`, checked against its hash. Raises: ChunkError."""
    data = _read_piece(blob_path(root, ref), 0, ref.num_bytes, whole=True)
    if hashlib.sha256(data).hexdigest() != ref.sha256:
        raise ChunkError(f"chunk {ref.sha256[:12]} is damaged")
    return data


class FolderChunks:
    """Chunks in the safetensors files of a folder. Raises: DataError if these are not whole."""

    def __init__(self, folder: Path) -> None:
        self.spans: Mapping[str, TensorSpan] = read_header(folder)

    def read(self, atom: IndexedTensor, number: int) -> bytes:
        span = self.spans.get(atom.name)
        if span is None or (span.dtype, span.shape) != (atom.dtype, atom.shape):
            raise ChunkError("is in no file" if span is None else "has another shape in its file")
        start = sum(chunk.num_bytes for chunk in atom.chunks[:number])
        return _read_piece(span.file, span.offset + start, atom.chunks[number].num_bytes)

    def ranges(self, atoms: Iterable[IndexedTensor]) -> Iterator[Range]:
        """Where every chunk lies; the files must have been audited."""
        for atom in atoms:
            span = self.spans[atom.name]
            offset = span.offset
            for chunk in atom.chunks:
                yield Range(chunk, span.file, offset)
                offset += chunk.num_bytes


def _read_piece(path: Path, offset: int, num_bytes: int, *, whole: bool = False) -> bytes:
    try:
        with path.open("rb") as file:
            if whole and os.fstat(file.fileno()).st_size != num_bytes:
                raise ChunkError("has another size")
            file.seek(offset)
            return file.read(num_bytes)
    except OSError as error:
        raise ChunkError(f"cannot be read: {error.strerror}") from None


# ---- is it whole -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Audit:
    """What is wrong with a checkpoint, one line each; empty if it is whole."""

    step: int
    weights_sha256: str
    problems: tuple[str, ...]


def _audit(checkpoint: Checkpoint, chunks: Chunks, on_bytes: OnBytes) -> tuple[str, list[str]]:
    """Check the signature, and every chunk against its hash; one chunk is in memory at a time.

    Returns the hash over the weights, and everything that is wrong.
    """
    manifest, problems, digest = checkpoint.manifest, list[str](), WeightsHash()
    if not checkpoint.is_authentic:
        problems.append(f"the signature is not that of its coordinator {manifest.coordinator}")
    for atom in manifest.atoms:
        is_weight = not atom.name.endswith(MOMENT_SUFFIXES)
        if is_weight:
            digest.begin(atom.name, atom.dtype, atom.shape)
        for number, chunk in enumerate(atom.chunks):
            data, what = b"", "is damaged"
            try:
                data = chunks.read(atom, number)
            except ChunkError as error:
                what = str(error)
            if hashlib.sha256(data).hexdigest() != chunk.sha256:
                where = f"chunk {number + 1} of {len(atom.chunks)} ({chunk.sha256[:12]})"
                problems.append(f"{atom.name}: {where} {what}")
            if is_weight:
                digest.update(data)
            on_bytes(chunk.num_bytes)
    if not problems and digest.hexdigest() != manifest.weights_sha256:
        problems.append("the hash over all weights is not the one in the manifest")
    return digest.hexdigest(), problems


def audit_folder(folder: Path, on_bytes: OnBytes = no_progress) -> Audit:
    """Check a checkpoint folder. Raises: DataError if it holds no readable manifest."""
    checkpoint = read_checkpoint(folder / MANIFEST_FILE)
    manifest = checkpoint.manifest
    try:
        chunks = FolderChunks(folder)
    except DataError as error:
        return Audit(manifest.step, "", (str(error),))
    weights_sha256, problems = _audit(checkpoint, chunks, on_bytes)
    foreign = chunks.spans.keys() - {atom.name for atom in manifest.atoms}
    problems += [f"{name}: is in a file but not in the manifest" for name in sorted(foreign)]
    if _config_of(folder) != manifest.config:
        problems.append(f"{CONFIG_FILE} is not the model's that the manifest names")
    return Audit(manifest.step, weights_sha256, _at_most(problems))


def audit_shelf(shelf: Shelf, blobs: Path, on_bytes: OnBytes = no_progress) -> tuple[Audit, ...]:
    """Check every checkpoint of a job, the oldest first, and that each names the one before."""
    audits, chunks, before = [], StoredChunks(blobs), None
    for step in shelf.steps():
        try:
            checkpoint = shelf.load(step)
        except DataError as error:
            audits.append(Audit(step, "", (str(error),)))
            before = None
            continue
        weights_sha256, problems = _audit(checkpoint, chunks, on_bytes)
        if checkpoint.manifest.step != step:
            problems.append(f"{shelf.path(step)} holds step {checkpoint.manifest.step}")
        if before is not None and checkpoint.manifest.parent != before:
            problems.append("it does not name the checkpoint before it as its parent")
        before = checkpoint.sha256
        audits.append(Audit(step, weights_sha256, _at_most(problems)))
    return tuple(audits)


def folder_weights_sha256(folder: Path) -> str:
    """The WeightsHash of any folder of safetensors files, in pieces. Raises: DataError."""
    digest, spans = WeightsHash(), read_header(folder)
    for name in sorted(name for name in spans if not name.endswith(MOMENT_SUFFIXES)):
        span = spans[name]
        digest.begin(name, span.dtype, span.shape)
        with span.file.open("rb") as file:
            file.seek(span.offset)
            left = span.num_bytes
            while left:
                data = file.read(min(CHUNK_BYTES, left))
                if not data:
                    raise DataError(f"{span.file} ended early: it changed while it was read")
                digest.update(data)
                left -= len(data)
    return digest.hexdigest()


def _at_most(problems: list[str]) -> tuple[str, ...]:
    more = len(problems) - MAX_PROBLEMS
    return (*problems[:MAX_PROBLEMS], *((f"and {more} more",) if more > 0 else ()))


def _config_of(folder: Path) -> object:
    try:
        return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


# ---- a folder that stands alone ----------------------------------------------------------------


def write_folder(
    directory: Path,
    checkpoint: Checkpoint,
    read: Callable[[BlobRef], bytes],
    texts: Mapping[str, Path],
    on_bytes: OnBytes = no_progress,
) -> None:
    """Write a checkpoint and the files of `texts` (name -> source) into a new or empty folder.

    One chunk is in memory at a time. Raises: BusyError if the folder is in use, SwarmError if it
    cannot be written, ChunkError if a chunk is missing; nothing is left under its name then.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise BusyError(f"{directory} exists and is not empty; give a new folder")

    def counted(ref: BlobRef) -> bytes:
        data = read(ref)
        on_bytes(len(data))
        return data

    partial = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.partial")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        for number, group in enumerate(groups_of(checkpoint.manifest.atoms)):
            write_safetensors(partial / f"atoms-{number:05d}.safetensors", group, counted)
        config = json.dumps(checkpoint.manifest.config, indent=2, sort_keys=True)
        _write(partial / CONFIG_FILE, config.encode())
        for name, source in texts.items():
            _write(partial / name, source.read_bytes())
        _write(partial / MANIFEST_FILE, checkpoint.to_bytes())  # last: all that it names is there
        sync_folder(partial)
        partial.rename(directory)
        sync_folder(directory.parent)
    except OSError as error:
        raise SwarmError(f"cannot write {directory}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def groups_of(atoms: Iterable[IndexedTensor]) -> list[list[IndexedTensor]]:
    """Atoms by file, in order: a weight and its moments together, files of about GROUP_BYTES."""
    by_weight: dict[str, list[IndexedTensor]] = {}
    for atom in atoms:
        by_weight.setdefault(atom.name.partition("::")[0], []).append(atom)
    groups: list[list[IndexedTensor]] = []
    room = 0
    for family in by_weight.values():
        num_bytes = sum(atom.num_bytes for atom in family)
        if not groups or num_bytes > room:
            groups.append([])
            room = GROUP_BYTES
        groups[-1] += family
        room -= num_bytes
    return groups


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
