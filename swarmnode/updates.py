"""The update of one stage in one step, by content: which chunks its bytes are.

An update is the coded sum of all gradients as it was broadcast: groups in order, parts in order,
one after the other. Its index is canonical JSON, {"step":k,"chunks":[[sha256,bytes],...]}: every
chunk but the last has CHUNK_BYTES.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from swarmnode.domain import BlobRef
from swarmnode.errors import ProtocolError
from swarmnode.wire import CHUNK_BYTES, MAX_BLOB_BYTES

MAX_CHUNKS = 1 << 17
"""128 GiB; the index of so many is still a blob."""
MAX_STEP = 1 << 62
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class UpdateIndex:
    """What an update consists of. Two are equal exactly if their bytes and their step are."""

    step: int
    chunks: tuple[BlobRef, ...]

    @property
    def num_bytes(self) -> int:
        return sum(chunk.num_bytes for chunk in self.chunks)

    @property
    def ref(self) -> BlobRef:
        """The name of the index itself, and so of the update."""
        data = self.to_json()
        return BlobRef(hashlib.sha256(data).hexdigest(), len(data))

    def to_json(self) -> bytes:
        rows = [[chunk.sha256, chunk.num_bytes] for chunk in self.chunks]
        return json.dumps({"step": self.step, "chunks": rows}, separators=(",", ":")).encode()

    @staticmethod
    def from_json(data: bytes) -> "UpdateIndex":
        """Read an index that may come from a stranger.

        Raises: ProtocolError for anything that `to_json` cannot have written.
        """
        if len(data) > MAX_BLOB_BYTES:
            raise ProtocolError(f"not an update's index: {len(data)} bytes")
        try:
            raw = json.loads(data)
            step, rows = raw["step"], raw["chunks"]
            chunks = tuple(BlobRef(sha256, num_bytes) for sha256, num_bytes in rows)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ProtocolError(f"not an update's index: {error!s:.200}") from None
        if type(step) is not int or not 0 <= step < MAX_STEP or len(chunks) > MAX_CHUNKS:
            raise ProtocolError("not an update's index: impossible step, or too many chunks")
        if not all(_is_chunk(chunk, is_last=chunk is chunks[-1]) for chunk in chunks):
            raise ProtocolError("not an update's index: a chunk has no hash or the wrong size")
        index = UpdateIndex(step, chunks)
        if index.to_json() != data:
            raise ProtocolError("not an update's index: not in its canonical form")
        return index


def _is_chunk(chunk: BlobRef, *, is_last: bool) -> bool:
    if type(chunk.sha256) is not str or type(chunk.num_bytes) is not int:
        return False
    least = 1 if is_last else CHUNK_BYTES
    return least <= chunk.num_bytes <= CHUNK_BYTES and bool(_HASH.fullmatch(chunk.sha256))


def index_update(step: int, payloads: Iterable[bytes | bytearray | memoryview]) -> UpdateIndex:
    """The index of an update whose bytes are those of `payloads`, one after the other."""
    chunks: list[BlobRef] = []
    running, filled = hashlib.sha256(), 0
    for payload in payloads:
        view = memoryview(payload).cast("B")
        while len(view):
            taken = view[: CHUNK_BYTES - filled]
            running.update(taken)
            filled += len(taken)
            view = view[len(taken) :]
            if filled == CHUNK_BYTES:
                chunks.append(BlobRef(running.hexdigest(), filled))
                running, filled = hashlib.sha256(), 0
    if filled:
        chunks.append(BlobRef(running.hexdigest(), filled))
    return UpdateIndex(step, tuple(chunks))
