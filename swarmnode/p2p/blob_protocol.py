"""What is said about blobs between peers: protocol `/swarmnode/blob/1`.

Requests follow each other on a stream. A request is one message, msgpack
`{job, sha256, num_bytes}`; the answer is one message, msgpack `{status}`, and behind "ok" or
"paced" the bytes, in messages of at most `PIECE_BYTES`. "paced" says that the bytes come slower
than the link could bring them. Before the answer there may be "wait" every `NOTICE_S`: others are
served first.
"""

from collections.abc import Callable
from typing import Any

import msgpack

from swarmnode.domain import PeerId
from swarmnode.errors import ProtocolError

PIECE_BYTES = 256 << 10
"""Also the largest message either side accepts: all that a stranger can make us allocate."""
MAX_REQUEST_BYTES = 1024
MIN_BYTES_PER_S = 16 << 10
"""A peer slower than this is as good as lost."""
MIN_TIMEOUT_S = 20.0
NOTICE_S = 5.0
MAX_NOTICES = 240
"""So often a peer may ask for patience before one answer: for 20 minutes."""

OnCount = Callable[[str, PeerId, int], None]
"""Called with what happened, with whom, and how much: see `serve_blobs`, `BlobClient`."""


def ignore_count(event: str, peer: PeerId, amount: int) -> None:
    """Count nothing."""


def timeout_s(num_bytes: int) -> float:
    """How long one answer of that size may take, from when it is its turn."""
    return MIN_TIMEOUT_S + num_bytes / MIN_BYTES_PER_S


def unpack(message: bytes | bytearray) -> dict[str, Any]:
    """The map in a request or an answer. Raises: ProtocolError."""
    try:
        body = msgpack.unpackb(message) if len(message) <= MAX_REQUEST_BYTES else None
    except (ValueError, msgpack.UnpackException) as error:
        raise ProtocolError(f"not msgpack: {error}") from None
    if not isinstance(body, dict):
        raise ProtocolError("a map was expected")
    return body
