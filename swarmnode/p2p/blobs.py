"""Chunks between peers: whoever takes part in a job serves its blobs, and fetches from many.

Protocol `/swarmnode/blob/1`: requests follow each other on a stream. A request is one message,
msgpack `{job, sha256, num_bytes}`; the answer is one message, msgpack `{status}`, and behind
"ok" the bytes, in messages of `PIECE_BYTES` (the last may be shorter). Every blob is checked
against its hash before it counts.
"""

import asyncio
import contextlib
import hashlib
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

import msgpack

from swarmnode.domain import BlobRef, JobId, PeerId
from swarmnode.errors import (
    ChunkError,
    PeerError,
    PeerLostError,
    ProtocolError,
    RefusedError,
    SwarmError,
)
from swarmnode.failpoints import hit
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.links import OnTransfer, ignore_transfer
from swarmnode.p2p.ports import EndOfStream, Stream, Transport, Urgency
from swarmnode.wire import BLOB_PROTOCOL, MAX_BLOB_BYTES

PIECE_BYTES = 256 << 10
"""Also the largest message either side accepts: all that a stranger can make us allocate."""
MAX_REQUEST_BYTES = 1024
MAX_STREAMS_PER_PEER = 16
MAX_SENDING = 8
"""Blobs that a server holds in memory at once; further requests wait."""
MIN_BYTES_PER_S = 16 << 10
"""A peer slower than this is as good as lost."""
MIN_TIMEOUT_S = 20.0

Provider = tuple[PeerId, Sequence[str]]
OnCount = Callable[[str, PeerId, int], None]
"""Called with what happened, with whom, and how much of it: see `serve_blobs`, `BlobClient`."""


def ignore_count(event: str, peer: PeerId, amount: int) -> None:
    """Count nothing."""


def timeout_s(num_bytes: int) -> float:
    """How long one answer of that size may take."""
    return MIN_TIMEOUT_S + num_bytes / MIN_BYTES_PER_S


# ---- serving ------------------------------------------------------------------------------------


def serve_blobs(
    transport: Transport,
    store: BlobStore,
    allowed: Callable[[PeerId, JobId], bool],
    on_count: OnCount = ignore_count,
) -> None:
    """Serve the blobs of `store` to peers that are `allowed` in the job they name.

    Whoever is allowed in any job and knows a hash may have the blob. A peer has at most
    `MAX_STREAMS_PER_PEER` streams; all answers in flight together hold `MAX_SENDING` blobs.
    Counts: sent_bytes, refused, missing, malformed (with the peer that asked).
    """
    handle = _Server(store, allowed, on_count).handle
    transport.serve(BLOB_PROTOCOL, handle, max_message_bytes=PIECE_BYTES, urgency=Urgency.BLOB)


class _Server:
    def __init__(
        self, store: BlobStore, allowed: Callable[[PeerId, JobId], bool], on_count: OnCount
    ) -> None:
        self._store = store
        self._allowed = allowed
        self._on_count = on_count
        self._streams: Counter[PeerId] = Counter()
        self._sending = asyncio.Semaphore(MAX_SENDING)

    async def handle(self, stream: Stream) -> None:
        """Answer requests until the peer closes, asks nothing for a while, or breaks a rule."""
        if self._streams[stream.peer] >= MAX_STREAMS_PER_PEER:
            self._on_count("refused", stream.peer, 1)
            return
        self._streams[stream.peer] += 1
        try:
            while True:
                async with asyncio.timeout(MIN_TIMEOUT_S):
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
        async with self._sending:
            try:
                data = await asyncio.to_thread(self._store.read, ref)
            except ChunkError:
                self._on_count("missing", stream.peer, 1)
                await _send(stream, {"status": "missing"})
                return
            async with asyncio.timeout(timeout_s(len(data))):
                await _send(stream, {"status": "ok"})
                for start in range(0, len(data), PIECE_BYTES):
                    await stream.send(memoryview(data)[start : start + PIECE_BYTES])
                    hit("seeding")
            self._on_count("sent_bytes", stream.peer, len(data))


def _parse_request(request: bytes | bytearray) -> tuple[JobId, BlobRef]:
    body = _unpack(request)
    job, sha256, num_bytes = body.get("job"), body.get("sha256"), body.get("num_bytes")
    if len(body) != 3 or not isinstance(job, str) or not isinstance(sha256, str):
        raise ProtocolError("blob request has the wrong fields")
    if type(num_bytes) is not int or not 0 <= num_bytes <= MAX_BLOB_BYTES:
        raise ProtocolError("blob request for an impossible size")
    return JobId(job), BlobRef(sha256, num_bytes)


def _unpack(message: bytes | bytearray) -> dict[str, Any]:
    try:
        body = msgpack.unpackb(message) if len(message) <= MAX_REQUEST_BYTES else None
    except (ValueError, msgpack.UnpackException) as error:
        raise ProtocolError(f"not msgpack: {error}") from None
    if not isinstance(body, dict):
        raise ProtocolError("a map was expected")
    return body


async def _send(stream: Stream, body: dict[str, Any]) -> None:
    async with asyncio.timeout(MIN_TIMEOUT_S):
        await stream.send(msgpack.packb(body))


# ---- fetching -----------------------------------------------------------------------------------


class BlobClient:
    """Fetches blobs from several peers into a store.

    Counts (with the peer that gave them): received_bytes, bad_chunk, lost, refused, missing.
    """

    def __init__(
        self,
        transport: Transport,
        store: BlobStore,
        on_count: OnCount = ignore_count,
        on_transfer: OnTransfer = ignore_transfer,
        *,
        max_in_flight: int = 4,
    ) -> None:
        self._transport = transport
        self._store = store
        self._on_count = on_count
        self._on_transfer = on_transfer
        self._max_in_flight = max_in_flight

    async def fetch(self, job: JobId, ref: BlobRef, providers: Sequence[Provider]) -> bytes:
        """The content of one blob, from the store or from the first provider that has it.

        Raises: as `fetch_all`.
        """
        await self.fetch_all(job, (ref,), providers)
        return await asyncio.to_thread(self._store.read, ref)

    async def fetch_all(
        self,
        job: JobId,
        refs: Iterable[BlobRef],
        providers: Sequence[Provider],
        progress: Callable[[int, int], None] | None = None,
        *,
        is_borrowed: bool = False,
    ) -> None:
        """Bring every blob of `refs` into the store, for good or borrowed, several at a time.

        What is already there and sound is kept, so a fetch that failed goes on where it was.
        A provider that breaks, refuses or sends a bad chunk is not asked again in this call;
        one that lacks a chunk is still asked for others. `progress(done_bytes, total_bytes)`
        is called at the start and after each blob.

        Raises, once some blob has no provider left: RefusedError if all refused, ChunkError
        if one sent bad bytes or all lack the blob, otherwise PeerLostError; SwarmError if the
        store is full.
        """
        wanted = list(dict.fromkeys(refs))
        absent = [ref for ref in wanted if not await asyncio.to_thread(self._is_sound, ref)]
        total_bytes = sum(ref.num_bytes for ref in wanted)
        missing_bytes = sum(ref.num_bytes for ref in absent)

        def report(done_bytes: int) -> None:
            if progress is not None:
                progress(total_bytes - missing_bytes + done_bytes, total_bytes)

        report(0)
        if not absent:
            return
        fetch = _Fetch(
            self._transport,
            self._store,
            self._on_count,
            self._on_transfer,
            job,
            absent,
            providers,
            report,
            is_borrowed,
        )
        failure: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(min(self._max_in_flight, len(absent))):
                    group.create_task(fetch.work(number), name=f"fetch-blobs-{number}")
        except* SwarmError as errors:
            failure = errors.exceptions[0]
        if failure is not None:
            raise failure

    def _is_sound(self, ref: BlobRef) -> bool:
        try:
            self._store.read(ref)
        except ChunkError:
            return False
        return True


class _Fetch:
    """One call of `fetch_all`: what is pending, and what each provider is good for."""

    def __init__(
        self,
        transport: Transport,
        store: BlobStore,
        on_count: OnCount,
        on_transfer: OnTransfer,
        job: JobId,
        absent: Sequence[BlobRef],
        providers: Sequence[Provider],
        report: Callable[[int], None],
        is_borrowed: bool,
    ) -> None:
        self._transport = transport
        self._store = store
        self._on_count = on_count
        self._on_transfer = on_transfer
        self._job = job
        self._pending = deque(absent)
        self._providers = dict(providers)
        self._dropped: dict[PeerId, PeerError | ChunkError] = {}
        self._lacking: dict[BlobRef, set[PeerId]] = {}
        self._load: Counter[PeerId] = Counter()
        self._arrived: Counter[PeerId] = Counter()
        """Bytes of each provider so far, over all streams: they share one link."""
        self._report = report
        self._is_borrowed = is_borrowed
        self._done_bytes = 0

    async def work(self, number: int) -> None:
        """Take pending blobs one after the other, with one stream open at a time."""
        stream: Stream | None = None
        try:
            while self._pending:
                ref = self._pending.popleft()
                peer = self._choose(ref, number, stream)
                if stream is not None and stream.peer != peer:
                    await stream.reset()
                    stream = None
                self._load[peer] += 1
                try:
                    async with self._judging(peer, ref):
                        if stream is None:
                            stream = await self._open(peer)
                        data = await self._exchange(stream, ref)
                        if data is not None:
                            await self._keep(peer, ref, data)
                            continue
                        self._lacking.setdefault(ref, set()).add(peer)
                        self._on_count("missing", peer, 1)
                finally:
                    self._load[peer] -= 1
                self._pending.append(ref)
        finally:
            if stream is not None:
                await stream.reset()

    def _choose(self, ref: BlobRef, number: int, stream: Stream | None) -> PeerId:
        """The least busy provider that may have it; workers start at different ones.

        Raises: the error that says why there is none.
        """
        lacking = self._lacking.get(ref, set())
        able = [p for p in self._providers if p not in self._dropped and p not in lacking]
        if not able:
            raise self._why(ref)
        turn = number % len(able)
        current = None if stream is None else stream.peer
        return min(able[turn:] + able[:turn], key=lambda p: (self._load[p], p != current))

    async def _open(self, peer: PeerId) -> Stream:
        return await self._transport.open(
            peer, self._providers[peer], BLOB_PROTOCOL, max_message_bytes=PIECE_BYTES
        )

    async def _keep(self, peer: PeerId, ref: BlobRef, data: bytearray) -> None:
        """Store what `peer` sent, if it is what was asked for. Raises: ChunkError if not."""
        if await asyncio.to_thread(_hash, data) != ref.sha256:
            raise ChunkError(f"peer {peer} sent a bad blob {ref.sha256:.12}")
        await asyncio.to_thread(self._store.put, data, is_borrowed=self._is_borrowed)
        self._on_count("received_bytes", peer, len(data))
        self._done_bytes += len(data)
        self._report(self._done_bytes)

    @contextlib.asynccontextmanager
    async def _judging(self, peer: PeerId, ref: BlobRef) -> AsyncIterator[None]:
        """Bound the time of one request; whatever goes wrong in it costs `peer` its place."""
        limit_s = timeout_s(ref.num_bytes)
        try:
            async with asyncio.timeout(limit_s):
                yield
        except TimeoutError:
            self._drop(peer, PeerLostError(peer, f"no blob in {limit_s:.0f} s"))
        except EndOfStream:
            self._drop(peer, PeerLostError(peer, "closed the stream before it sent the blob"))
        except ProtocolError as error:
            self._drop(peer, ChunkError(f"peer {peer} sent a bad answer: {error}"))
        except (PeerError, ChunkError) as error:
            self._drop(peer, error)

    async def _exchange(self, stream: Stream, ref: BlobRef) -> bytearray | None:
        request = {"job": self._job, "sha256": ref.sha256, "num_bytes": ref.num_bytes}
        await stream.send(msgpack.packb(request))
        status = _unpack(await stream.receive()).get("status")
        if status == "refused":
            raise RefusedError(stream.peer, f"we may not have blobs of job {self._job}")
        if status == "missing":
            return None
        if status != "ok":
            raise ProtocolError("blob answer has the wrong fields")
        first_s, before = 0.0, 0
        data = bytearray(ref.num_bytes)
        filled = 0
        while filled < ref.num_bytes:
            piece = await stream.receive()
            if not 0 < len(piece) <= ref.num_bytes - filled:
                raise ProtocolError(f"a piece of {len(piece)} bytes does not fit the blob")
            data[filled : filled + len(piece)] = piece
            self._arrived[stream.peer] += len(piece)
            if filled == 0:
                first_s, before = time.monotonic(), self._arrived[stream.peer]
            filled += len(piece)
        if ref.num_bytes > PIECE_BYTES:  # the link was busy from the first piece to the last
            self._on_transfer(
                stream.peer, self._arrived[stream.peer] - before, time.monotonic() - first_s
            )
        return data

    def _drop(self, peer: PeerId, error: PeerError | ChunkError) -> None:
        """Ask `peer` for nothing more, and charge it once."""
        if peer in self._dropped:
            return
        self._dropped[peer] = error
        names = {ChunkError: "bad_chunk", RefusedError: "refused"}
        self._on_count(names.get(type(error), "lost"), peer, 1)

    def _why(self, ref: BlobRef) -> Exception:
        """Why no provider is left for `ref`: the error to raise, in one line."""
        errors = list(self._dropped.values())
        story = "; ".join(str(error) for error in errors) or "nobody to ask"
        what = f"blob {ref.sha256:.12} of job {self._job} from {len(self._providers)} providers"
        lacking = len(self._lacking.get(ref, ()))
        if errors and not lacking and all(isinstance(error, RefusedError) for error in errors):
            return errors[0]
        if lacking or not errors or any(isinstance(error, ChunkError) for error in errors):
            return ChunkError(f"cannot get {what}: {lacking} lack it; {story:.300}")
        lost = next(peer for peer, error in self._dropped.items() if error is errors[-1])
        return PeerLostError(lost, f"cannot get {what}: {story:.300}")


def _hash(data: bytearray) -> str:
    return hashlib.sha256(data).hexdigest()
