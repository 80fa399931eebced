"""Where each tensor of a safetensors file or folder lies: a strict reader of headers, no torch.

A file is eight bytes with the header's length (little endian), the header (JSON), then the data.
Everything is checked before it is believed: files come from strangers.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from swarmnode.errors import DataError

MAX_HEADER_BYTES = 16 << 20
MAX_INDEX_BYTES = 64 << 20
MAX_TENSORS = 1 << 18
MAX_FILES = 4096
MAX_NAME_CHARS = 512
MAX_DIMENSIONS = 8
INDEX_NAME = "model.safetensors.index.json"
ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes per value of every dtype that is accepted."""
DATA_SHA256 = "data_sha256"
"""Metadata of files that we write: over `NAME line-feed bytes` of all tensors, sorted by name."""


@dataclass(frozen=True)
class TensorSpan:
    """One tensor's bytes in one file: [offset, offset + num_bytes), row-major, little endian."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    """From the start of the file, header included."""
    num_bytes: int


def read_header(path: Path) -> dict[str, TensorSpan]:
    """Return the span of every tensor of a safetensors file, or of a folder of such files.

    A folder is read by its `model.safetensors.index.json` if there is one, else all its
    `*.safetensors` files are read. Order: by file, then by offset.
    Bound: the header is at most `MAX_HEADER_BYTES`; its length is checked before it is read.
    Raises: DataError, naming the file, for anything that is not a well-formed safetensors file.
    """
    if not path.is_dir():
        return _read_file(path)
    if (path / INDEX_NAME).exists():
        return _read_indexed(path)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise DataError(f"{path} holds no safetensors file")
    if len(files) > MAX_FILES:
        raise DataError(f"{path} holds {len(files)} safetensors files, at most {MAX_FILES}")
    spans: dict[str, TensorSpan] = {}
    for file in files:
        for name, span in _read_file(file).items():
            if name in spans:
                raise DataError(f"{path}: tensor {name!r} is in two files")
            spans[name] = span
    return spans


def read_bytes(span: TensorSpan) -> bytearray:
    """Return the bytes of one tensor. Raises: DataError if the file has become shorter."""
    buffer = bytearray(span.num_bytes)
    try:
        with span.file.open("rb") as file:
            file.seek(span.offset)
            num_read = file.readinto(buffer)
    except OSError as error:
        raise DataError(f"cannot read {span.file}: {error.strerror}") from error
    if num_read != span.num_bytes:
        raise DataError(f"{span.file} ended early: it changed while it was read")
    return buffer


def check_data(path: Path) -> None:
    """Check a file's tensors against the hash in its metadata, where it has one.

    Raises: DataError if they are others than were written.
    """
    spans = read_header(path)
    with _open_regular(path) as file:
        header = _parse(file.read(int.from_bytes(file.read(8), "little")), path)
    said = header.get("__metadata__", {}).get(DATA_SHA256)
    if said is None:
        return
    digest = hashlib.sha256()
    for name, span in sorted(spans.items()):
        digest.update(name.encode() + b"\n")
        digest.update(read_bytes(span))
    if digest.hexdigest() != said:
        raise DataError(f"{path} is damaged: its tensors are not those that were written")


def _read_indexed(folder: Path) -> dict[str, TensorSpan]:
    """Follow the index: every tensor it names must be in the file it names, and no other."""
    where = folder / INDEX_NAME
    with _open_regular(where) as file:
        text = file.read(MAX_INDEX_BYTES + 1)
    if len(text) > MAX_INDEX_BYTES:
        raise DataError(f"{where} is larger than {MAX_INDEX_BYTES} bytes")
    index = _parse(text, where)
    files_by_name = index.get("weight_map")
    if not isinstance(files_by_name, dict) or not files_by_name:
        raise DataError(f"{where} has no weight_map")
    for file_name in files_by_name.values():
        if not isinstance(file_name, str) or not _is_plain_file_name(file_name):
            raise DataError(f"{where} names a file outside its folder")
    file_names = sorted(set(files_by_name.values()))
    if len(file_names) > MAX_FILES:
        raise DataError(f"{where} names {len(file_names)} files, at most {MAX_FILES}")
    spans: dict[str, TensorSpan] = {}
    for file_name in file_names:
        for name, span in _read_file(folder / file_name).items():
            if files_by_name.get(name) != file_name:
                raise DataError(f"{where} does not place tensor {name!r} in {file_name}")
            spans[name] = span
    for name, file_name in files_by_name.items():
        if name not in spans:
            raise DataError(f"{where} names tensor {name!r}, which is not in {file_name}")
    return spans


def _read_file(path: Path) -> dict[str, TensorSpan]:
    with _open_regular(path) as file:
        file_bytes = os.fstat(file.fileno()).st_size
        start = file.read(8)
        header_bytes = int.from_bytes(start, "little")
        if len(start) < 8 or header_bytes < 2 or 8 + header_bytes > file_bytes:
            raise DataError(f"{path} is not a safetensors file: its header does not fit")
        if header_bytes > MAX_HEADER_BYTES:
            raise DataError(f"{path} has a header of {header_bytes} bytes, over the limit")
        text = file.read(header_bytes)
    header = _parse(text, path)
    _check_metadata(header.pop("__metadata__", {}), path)
    if len(header) > MAX_TENSORS:
        raise DataError(f"{path} holds {len(header)} tensors, at most {MAX_TENSORS}")
    data_start = 8 + header_bytes
    found = [(name, _span(name, entry, path, data_start)) for name, entry in header.items()]
    found.sort(key=lambda item: (item[1].offset, item[1].num_bytes))
    end = data_start
    for name, span in found:
        if span.offset != end:
            raise DataError(f"{path}: tensor {name!r} overlaps another or leaves a hole")
        end += span.num_bytes
    if end != file_bytes:
        raise DataError(f"{path} is {file_bytes} bytes long, but its tensors end at {end}")
    return dict(found)


def _span(name: str, entry: Any, path: Path, data_start: int) -> TensorSpan:
    if not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise DataError(f"{path} has an unusable tensor name")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise DataError(f"{path}: tensor {name!r} is not described by dtype, shape, data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise DataError(f"{path}: tensor {name!r} has a dtype that is not accepted")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise DataError(f"{path}: tensor {name!r} has an impossible shape")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise DataError(f"{path}: tensor {name!r} has impossible offsets")
    num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != num_bytes:
        raise DataError(f"{path}: tensor {name!r} needs {num_bytes} bytes, its offsets disagree")
    return TensorSpan(dtype, tuple(shape), path, data_start + offsets[0], num_bytes)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 48 for v in values)


def _check_metadata(metadata: Any, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise DataError(f"{path} has metadata other than text")


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    """Parse a JSON object; a repeated key or a constant outside JSON (NaN) is refused."""
    try:
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=_no_repeats, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} has a header that is not strict JSON") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} has a header that is not a JSON object")
    return value


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key appears twice")
    return value


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _is_plain_file_name(name: str) -> bool:
    return (
        name.endswith(".safetensors")
        and name.isprintable()
        and not name.startswith(".")
        and not set(name) & set('/\\:"')
    )


@contextmanager
def _open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading; anything else (a pipe, a device) is refused."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise DataError(f"{path} is not a regular file")
        yield file
