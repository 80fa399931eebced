"""Chunks of peers: whoever takes part in a job fetches its blobs, from many.

Every blob is checked against its hash before it counts. What is said on the wire is in
`blob_protocol`, the other side in `blob_server`.
"""

import asyncio
import contextlib
import hashlib
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

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
from swarmnode.p2p import blob_protocol
from swarmnode.p2p.blob_protocol import PIECE_BYTES, OnCount, ignore_count
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.links import OnTransfer, ignore_transfer
from swarmnode.p2p.ports import EndOfStream, Stream, Transport
from swarmnode.p2p.suspects import Suspects
from swarmnode.wire import BLOB_PROTOCOL

Provider = tuple[PeerId, Sequence[str]]


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
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._store = store
        self._on_count = on_count
        self._on_transfer = on_transfer
        self._max_in_flight = max_in_flight
        self._now_s = now_s
        self._suspects = Suspects()

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
        one that sent a bad chunk is asked last in further calls, for `SUSPECT_S`; one that
        lacks a chunk is still asked for others. `progress(done_bytes, total_bytes)`
        is called at the start and after each blob.

        Raises, once some blob has no provider left: RefusedError if all refused, ChunkError
        if one sent bad bytes or all lack the blob, otherwise PeerLostError; SwarmError if the
        store is full.
        """
        wanted = list(dict.fromkeys(refs))
        absent = [ref for ref in wanted if not await asyncio.to_thread(self._store.is_sound, ref)]
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
            self._suspects,
            self._now_s,
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
        suspects: Suspects,
        now_s: Callable[[], float],
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
        self._suspects = suspects
        self._now_s = now_s
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
                    async with self._judging(peer, ref) as limit:
                        if stream is None:
                            stream = await self._open(peer)
                        data = await self._exchange(stream, ref, limit)
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
        now_s = self._now_s()
        able = [p for p in able if not self._suspects.has(p, now_s)] or able
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
    async def _judging(self, peer: PeerId, ref: BlobRef) -> AsyncIterator[asyncio.Timeout]:
        """Bound the time of one request; whatever goes wrong in it costs `peer` its place."""
        limit_s = blob_protocol.timeout_s(ref.num_bytes)
        try:
            async with asyncio.timeout(limit_s) as limit:
                yield limit
        except TimeoutError:
            self._drop(peer, PeerLostError(peer, f"no blob in {limit_s:.0f} s"))
        except EndOfStream:
            self._drop(peer, PeerLostError(peer, "closed the stream before it sent the blob"))
        except ProtocolError as error:
            self._drop(peer, ChunkError(f"peer {peer} sent a bad answer: {error}"))
        except (PeerError, ChunkError) as error:
            self._drop(peer, error)

    async def _exchange(
        self, stream: Stream, ref: BlobRef, limit: asyncio.Timeout
    ) -> bytearray | None:
        request = {"job": self._job, "sha256": ref.sha256, "num_bytes": ref.num_bytes}
        await stream.send(msgpack.packb(request))
        status = await _turn(stream, ref, limit)
        if status == "refused":
            raise RefusedError(stream.peer, f"we may not have blobs of job {self._job}")
        if status == "missing":
            return None
        if status not in ("ok", "paced"):
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
                first_s, before = self._now_s(), self._arrived[stream.peer]
            filled += len(piece)
        # Unless it is paced, the link was busy from the first piece to the last.
        if status == "ok" and ref.num_bytes > PIECE_BYTES:
            self._on_transfer(
                stream.peer, self._arrived[stream.peer] - before, self._now_s() - first_s
            )
        return data

    def _drop(self, peer: PeerId, error: PeerError | ChunkError) -> None:
        """Ask `peer` for nothing more, and charge it once."""
        if peer in self._dropped:
            return
        self._dropped[peer] = error
        if isinstance(error, ChunkError):
            self._suspects.charge(peer, self._now_s())
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


async def _turn(stream: Stream, ref: BlobRef, limit: asyncio.Timeout) -> object:
    """What the peer answers, after as much patience as it asks for and a peer may."""
    for _ in range(blob_protocol.MAX_NOTICES):
        status: object = blob_protocol.unpack(await stream.receive()).get("status")
        if status != "wait":
            return status
        now_s = asyncio.get_running_loop().time()
        limit.reschedule(now_s + blob_protocol.timeout_s(ref.num_bytes))
    raise ProtocolError("the peer asks for patience without end")


def _hash(data: bytearray) -> str:
    return hashlib.sha256(data).hexdigest()
