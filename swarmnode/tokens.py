"""A token stream in content-addressed chunks: what the coordinator writes and workers read."""

import json
import re
from dataclasses import dataclass
from typing import Any, Literal, Self

from swarmnode.domain import BlobRef
from swarmnode.errors import DataError
from swarmnode.wire import CHUNK_BYTES, MAX_BLOB_BYTES

TokenDtype = Literal["uint16", "uint32"]
TOKEN_BYTES: dict[TokenDtype, int] = {"uint16": 2, "uint32": 4}
_HASH = re.compile(r"[0-9a-f]{64}")
_KEYS = {"chunk_tokens", "chunks", "dtype", "format", "num_tokens"}
_FORMAT = "swarmnode-tokens-1"


def token_dtype(vocab_size: int) -> TokenDtype:
    """The narrowest dtype that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class TokenIndex:
    """Token ids, little endian, cut into chunks of `chunk_tokens`; the last may be shorter."""

    dtype: TokenDtype
    chunk_tokens: int
    num_tokens: int
    chunks: tuple[BlobRef, ...]

    def __post_init__(self) -> None:
        """Raises: DataError if the numbers do not fit together."""
        if self.dtype not in TOKEN_BYTES:
            raise DataError(f"token index: unknown dtype {self.dtype!r:.20}")
        token_bytes = TOKEN_BYTES[self.dtype]
        if not 1 <= self.chunk_tokens <= MAX_BLOB_BYTES // token_bytes or self.num_tokens < 0:
            raise DataError("token index: a count is out of range")
        if len(self.chunks) != -(-self.num_tokens // self.chunk_tokens):
            raise DataError(f"token index: {len(self.chunks)} chunks do not hold the tokens")
        for number, chunk in enumerate(self.chunks):
            if chunk.num_bytes != self.tokens_in(number) * token_bytes:
                raise DataError(f"token index: chunk {number} has the wrong size")

    def tokens_in(self, chunk: int) -> int:
        """How many tokens the chunk of that number holds."""
        return min(self.chunk_tokens, self.num_tokens - chunk * self.chunk_tokens)

    def canonical(self) -> bytes:
        """One fixed JSON form: the bytes that are hashed. Sizes of chunks follow from counts."""
        body = {
            "chunk_tokens": self.chunk_tokens,
            "chunks": [chunk.sha256 for chunk in self.chunks],
            "dtype": self.dtype,
            "format": _FORMAT,
            "num_tokens": self.num_tokens,
        }
        return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read what `canonical` wrote; the bytes may come from a stranger.

        Raises: DataError if they are anything else.
        """
        if len(data) > MAX_BLOB_BYTES:
            raise DataError(f"token index of {len(data)} bytes; at most {MAX_BLOB_BYTES}")
        try:
            body: Any = json.loads(data)
        except (ValueError, RecursionError):
            raise DataError("token index: not JSON") from None
        if not isinstance(body, dict) or set(body) != _KEYS or body["format"] != _FORMAT:
            raise DataError(f"token index: not a {_FORMAT} object")
        chunk_tokens, num_tokens, hashes = body["chunk_tokens"], body["num_tokens"], body["chunks"]
        dtype = body["dtype"]
        if type(chunk_tokens) is not int or type(num_tokens) is not int:
            raise DataError("token index: a count is not an integer")
        if dtype not in ("uint16", "uint32") or not isinstance(hashes, list):
            raise DataError("token index: a field has the wrong type")
        if not all(isinstance(text, str) and _HASH.fullmatch(text) for text in hashes):
            raise DataError("token index: a chunk is not named by a SHA-256")
        return cls(dtype, chunk_tokens, num_tokens, _refs(hashes, dtype, chunk_tokens, num_tokens))


def _refs(
    hashes: list[str], dtype: TokenDtype, chunk_tokens: int, num_tokens: int
) -> tuple[BlobRef, ...]:
    """Name each chunk with the size that the counts give it."""
    token_bytes = TOKEN_BYTES[dtype]
    sizes = [chunk_tokens * token_bytes] * max(0, len(hashes) - 1)
    sizes.append((num_tokens - chunk_tokens * len(sizes)) * token_bytes)
    return tuple(BlobRef(text, size) for text, size in zip(hashes, sizes, strict=False))


def full_chunk_tokens(dtype: TokenDtype) -> int:
    """Tokens in a chunk of 1 MiB."""
    return CHUNK_BYTES // TOKEN_BYTES[dtype]
