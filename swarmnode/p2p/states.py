"""Tensors as chunks: publish a safetensors file or folder by content, and write one back.

The index is canonical JSON: {"step": n, "tensors": [[name, dtype, shape, [[sha256, bytes]..]]..]}.
A tensor never shares a chunk with another one, so a peer fetches exactly the tensors it needs.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from swarmnode.domain import BlobRef
from swarmnode.errors import ProtocolError
from swarmnode.p2p.blob_store import Range
from swarmnode.tensorfiles import DATA_SHA256, ITEM_BYTES, TensorSpan
from swarmnode.wire import CHUNK_BYTES, MAX_BLOB_BYTES

MAX_TENSORS = 1 << 18
_HASH = re.compile(r"[0-9a-f]{64}")
ADAMW_SUFFIXES = ("::exp_avg", "::exp_avg_sq")
OUTER_SUFFIXES = ("::outer_momentum",)
"""Of jobs with local steps, whose outer step has a momentum."""
MOMENT_SUFFIXES = ADAMW_SUFFIXES + OUTER_SUFFIXES


@dataclass(frozen=True)
class IndexedTensor:
    """One tensor: its dtype (safetensors' name), shape, and its bytes as chunks in order."""

    name: Annotated[str, Field(min_length=1, max_length=512)]
    dtype: str
    shape: Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 48)], ...], Field(max_length=8)]
    chunks: tuple[BlobRef, ...]

    @property
    def num_bytes(self) -> int:
        return sum(chunk.num_bytes for chunk in self.chunks)


@dataclass(frozen=True)
class TensorIndex:
    """The tensors of one state after `step` committed steps."""

    step: int
    tensors: tuple[IndexedTensor, ...]

    def pick(self, wanted: Callable[[str], bool]) -> "TensorIndex":
        """The same state with only the tensors whose name is wanted."""
        return TensorIndex(self.step, tuple(t for t in self.tensors if wanted(t.name)))

    def chunks(self) -> tuple[BlobRef, ...]:
        """Every chunk once, in order of first use."""
        return tuple(dict.fromkeys(c for tensor in self.tensors for c in tensor.chunks))

    def to_json(self) -> bytes:
        body = {"step": self.step, "tensors": rows_of(self.tensors)}
        return json.dumps(body, separators=(",", ":")).encode()

    @staticmethod
    def from_json(data: bytes) -> "TensorIndex":
        """Raises: ProtocolError for anything that `to_json` cannot have written."""
        try:
            raw = json.loads(data)
            step, rows = raw["step"], raw["tensors"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ProtocolError(f"not a tensor index: {error!s:.200}") from None
        if type(step) is not int or step < 0:
            raise ProtocolError("not a tensor index: impossible step")
        return TensorIndex(step, tensors_of(rows))


def rows_of(tensors: Iterable[IndexedTensor]) -> list[Any]:
    """Tensors as they are written in JSON: [name, dtype, shape, [[sha256, bytes]..]] each."""
    return [
        [t.name, t.dtype, list(t.shape), [[c.sha256, c.num_bytes] for c in t.chunks]]
        for t in tensors
    ]


def tensors_of(rows: Any) -> tuple[IndexedTensor, ...]:
    """The tensors of `rows_of`. Raises: ProtocolError for anything that it cannot have made."""
    try:
        if len(rows) > MAX_TENSORS:
            raise ProtocolError("not a tensor index: too many tensors")
        tensors = tuple(
            _TENSOR.validate_python(
                {
                    "name": name,
                    "dtype": dtype,
                    "shape": shape,
                    "chunks": [{"sha256": h, "num_bytes": n} for h, n in chunks],
                }
            )
            for name, dtype, shape, chunks in rows
        )
    except (ValueError, TypeError, KeyError, ValidationError) as error:
        reason = " ".join(str(error).split())
        raise ProtocolError(f"not a tensor index: {reason:.200}") from None
    for tensor in tensors:
        _check_sizes(tensor)
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ProtocolError("not a tensor index: a tensor appears twice")
    return tensors


_TENSOR = TypeAdapter(IndexedTensor)


def _check_sizes(tensor: IndexedTensor) -> None:
    size = ITEM_BYTES.get(tensor.dtype)
    if size is None:
        raise ProtocolError(f"tensor {tensor.name!r} has dtype {tensor.dtype!r:.20}")
    for dimension in tensor.shape:
        size *= dimension
    if size != tensor.num_bytes or any(
        not 0 < c.num_bytes <= CHUNK_BYTES or not _HASH.fullmatch(c.sha256) for c in tensor.chunks
    ):
        raise ProtocolError(f"tensor {tensor.name!r}: its chunks do not add up to its shape")


def index_tensors(
    spans: Mapping[str, TensorSpan], step: int, progress: Callable[[int], None] | None = None
) -> tuple[TensorIndex, list[Range]]:
    """Hash every tensor of a file or folder in chunks; `progress` gets bytes done so far."""
    tensors, ranges, done = [], [], 0
    for name, span in spans.items():
        chunks = []
        with span.file.open("rb") as file:
            file.seek(span.offset)
            left = span.num_bytes
            while left:
                data = file.read(min(CHUNK_BYTES, left))
                if not data:
                    raise ProtocolError(f"{span.file} ended early")
                ref = BlobRef(hashlib.sha256(data).hexdigest(), len(data))
                chunks.append(ref)
                ranges.append(Range(ref, span.file, span.offset + span.num_bytes - left))
                left -= len(data)
                done += len(data)
                if progress:
                    progress(done)
        tensors.append(IndexedTensor(name, span.dtype, span.shape, tuple(chunks)))
    index = TensorIndex(step, tuple(tensors))
    assert len(index.to_json()) <= MAX_BLOB_BYTES
    return index, ranges


def write_safetensors(
    path: Path,
    tensors: Iterable[IndexedTensor],
    read: Callable[[BlobRef], bytes],
    *,
    is_checkable: bool = False,
) -> None:
    """Write the tensors as one safetensors file: complete and flushed, or not there at all.

    Where it is to be checkable, it says the hash that `check_data` looks for. The tensors lie in
    the given order, but are written by name: so that hash is known after one pass, and the header,
    whose length is known before, is written last.
    """
    rows, digest = list(tensors), hashlib.sha256()
    metadata = {"format": "pt", **({DATA_SHA256: digest.hexdigest()} if is_checkable else {})}
    header: dict[str, object] = {"__metadata__": metadata}
    starts: dict[str, int] = {}
    offset = 0
    for tensor in rows:
        stop = offset + tensor.num_bytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, stop],
        }
        starts[tensor.name] = offset
        offset = stop
    data_start = len(_header_bytes(header))
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            for tensor in sorted(rows, key=lambda tensor: tensor.name):
                digest.update(tensor.name.encode() + b"\n")
                file.seek(data_start + starts[tensor.name])
                for chunk in tensor.chunks:
                    data = read(chunk)
                    file.write(data)
                    if is_checkable:
                        digest.update(data)
            if is_checkable:
                metadata[DATA_SHA256] = digest.hexdigest()
            file.seek(0)
            file.write(_header_bytes(header))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _header_bytes(header: Mapping[str, object]) -> bytes:
    """What a safetensors file begins with."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
