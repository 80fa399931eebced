"""Whoever takes part in a job serves its blobs: see `blob_protocol`.

All answers of a node share one upload, which may be limited: as many are sent at a time as leave
each well above what counts as lost. Further requests wait in the order in which they came.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgpack

from swarmnode.domain import BlobRef, JobId, PeerId
from swarmnode.errors import ChunkError, ProtocolError
from swarmnode.failpoints import hit
from swarmnode.p2p import blob_protocol
from swarmnode.p2p.blob_protocol import MIN_BYTES_PER_S, PIECE_BYTES, OnCount, ignore_count
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.ports import EndOfStream, Stream, Transport, Urgency
from swarmnode.p2p.token_bucket import TokenBucket
from swarmnode.wire import BLOB_PROTOCOL, MAX_BLOB_BYTES

MAX_STREAMS_PER_PEER = 16
MAX_SENDING = 8
"""Blobs that a server holds in memory at once; further requests wait."""
LEAST_PIECE_BYTES = 16 << 10
PIECES_PER_S = 8
"""A limited upload goes in pieces that are no larger than it takes: it does not come in jerks."""


def serve_blobs(
    transport: Transport,
    store: BlobStore,
    allowed: Callable[[PeerId, JobId], bool],
    on_count: OnCount = ignore_count,
    *,
    upload_bytes_per_s: float | None = None,
) -> None:
    """Serve the blobs of `store` to peers that are `allowed` in the job they name.

    Whoever is allowed in any job and knows a hash may have the blob. A peer has at most
    `MAX_STREAMS_PER_PEER` streams; all answers in flight together hold `MAX_SENDING` blobs, and
    leave at `upload_bytes_per_s` at most (no limit unless given).
    Counts: sent_bytes, refused, missing, malformed (with the peer that asked).
    """
    upload = None if upload_bytes_per_s is None else _Upload(upload_bytes_per_s)
    handle = _Server(store, allowed, on_count, upload).handle
    transport.serve(BLOB_PROTOCOL, handle, max_message_bytes=PIECE_BYTES, urgency=Urgency.BLOB)


class _Upload:
    """What all answers of a node may send together."""

    def __init__(self, bytes_per_s: float) -> None:
        least = max(LEAST_PIECE_BYTES, int(bytes_per_s / PIECES_PER_S))
        self.piece_bytes = min(PIECE_BYTES, least)
        self.num_at_once = int(min(MAX_SENDING, max(1, bytes_per_s // (4 * MIN_BYTES_PER_S))))
        self._bucket = TokenBucket(bytes_per_s, self.piece_bytes)

    async def wait(self, num_bytes: int) -> None:
        """Return when so many bytes may go."""
        await asyncio.sleep(self._bucket.take(num_bytes, asyncio.get_running_loop().time()))


class _Places:
    """So many at a time, first come first served."""

    def __init__(self, num_places: int) -> None:
        self._num_places = num_places
        self._line: list[asyncio.Future[None]] = []

    @contextlib.asynccontextmanager
    async def taken(self, say_wait: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
        """Hold a place; `say_wait` is called every `NOTICE_S` until there is one."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(place)
        self._admit()
        try:
            while not place.done():
                await asyncio.wait({place}, timeout=blob_protocol.NOTICE_S)
                if not place.done():
                    await say_wait()
            yield
        finally:
            self._line.remove(place)
            self._admit()

    def _admit(self) -> None:
        for place in self._line[: self._num_places]:
            if not place.done():
                place.set_result(None)


class _Server:
    def __init__(
        self,
        store: BlobStore,
        allowed: Callable[[PeerId, JobId], bool],
        on_count: OnCount,
        upload: _Upload | None,
    ) -> None:
        self._store = store
        self._allowed = allowed
        self._on_count = on_count
        self._upload = upload
        self._streams: Counter[PeerId] = Counter()
        self._places = _Places(MAX_SENDING if upload is None else upload.num_at_once)

    async def handle(self, stream: Stream) -> None:
        """Answer requests until the peer closes, asks nothing for a while, or breaks a rule."""
        if self._streams[stream.peer] >= MAX_STREAMS_PER_PEER:
            self._on_count("refused", stream.peer, 1)
            return
        self._streams[stream.peer] += 1
        try:
            while True:
                async with asyncio.timeout(blob_protocol.MIN_TIMEOUT_S):
                    request = await stream.receive()
                await self._answer(stream, request)
        except (EndOfStream, TimeoutError):
            pass
        except ProtocolError:
            self._on_count("malformed", stream.peer, 1)
            raise
        finally:
            self._streams[stream.peer] -= 1
            if not self._streams[stream.peer]:
                del self._streams[stream.peer]

    async def _answer(self, stream: Stream, request: bytes | bytearray) -> None:
        job, ref = _parse_request(request)
        if not self._allowed(stream.peer, job):
            self._on_count("refused", stream.peer, 1)
            await _send(stream, {"status": "refused"})
            return
        async with self._places.taken(lambda: _send(stream, {"status": "wait"})):
            try:
                data = await asyncio.to_thread(self._store.read, ref)
            except ChunkError:
                self._on_count("missing", stream.peer, 1)
                await _send(stream, {"status": "missing"})
                return
            async with asyncio.timeout(blob_protocol.timeout_s(len(data))):
                await self._send_blob(stream, data)
            self._on_count("sent_bytes", stream.peer, len(data))

    async def _send_blob(self, stream: Stream, data: bytes) -> None:
        upload = self._upload
        await _send(stream, {"status": "ok" if upload is None else "paced"})
        piece_bytes = PIECE_BYTES if upload is None else upload.piece_bytes
        for start in range(0, len(data), piece_bytes):
            piece = memoryview(data)[start : start + piece_bytes]
            if upload is not None:
                await upload.wait(len(piece))
            await stream.send(piece)
            hit("seeding")


def _parse_request(request: bytes | bytearray) -> tuple[JobId, BlobRef]:
    body = blob_protocol.unpack(request)
    job, sha256, num_bytes = body.get("job"), body.get("sha256"), body.get("num_bytes")
    if len(body) != 3 or not isinstance(job, str) or not isinstance(sha256, str):
        raise ProtocolError("blob request has the wrong fields")
    if type(num_bytes) is not int or not 0 <= num_bytes <= MAX_BLOB_BYTES:
        raise ProtocolError("blob request for an impossible size")
    return JobId(job), BlobRef(sha256, num_bytes)


async def _send(stream: Stream, body: dict[str, Any]) -> None:
    async with asyncio.timeout(blob_protocol.MIN_TIMEOUT_S):
        await stream.send(msgpack.packb(body))
