"""Tensors between the workers of a job: who may send, where frames go, what was sent.

One tensor stream per direction, pair of peers and urgency, opened at the first frame and kept: so
a long parameter gradient holds up no hidden state. Frames to oneself never touch the network. A
peer that the job's current plan does not name is refused and counted; so is a frame of an older
generation.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from swarmnode.domain import JobId, PeerId, Plan
from swarmnode.errors import PeerError, PeerLostError, ProtocolError
from swarmnode.messages import (
    Announce,
    Frame,
    Message,
    SentKind,
)
from swarmnode.p2p.links import LARGE_BYTES, ArrivalClock, OnTransfer, ignore_transfer
from swarmnode.p2p.ports import EndOfStream, Stream, Transport, Urgency
from swarmnode.session_messages import (
    SessionClose,
    SessionFailed,
    SessionFrame,
    SessionToken,
)
from swarmnode.traces import Fact, OnSpan, ignore_span
from swarmnode.wire import MAX_TENSOR_BYTES, TENSOR_PROTOCOL, pack, unpack

MAX_QUEUED_FRAMES = 1024
MIN_TIMEOUT_S = 30.0
MIN_BYTES_PER_S = 64 << 10
"""A link that is slower than this is as good as broken."""

ANNOUNCE_EVERY_S = 0.5
"""On each stream, one large message in so much time is announced, so that it can be timed."""

TensorMessage = Frame | SessionFrame | SessionToken | SessionFailed | SessionClose
Deliver = Callable[[TensorMessage, bytes | bytearray | memoryview], Awaitable[None]]


class _Queued(NamedTuple):
    """A message that waits for the line."""

    message: TensorMessage
    payload: bytes | memoryview
    queued_s: float


@dataclass
class _Lane:
    """What one peer is still to be sent about one job, of one urgency."""

    queue: asyncio.Queue[_Queued]
    task: asyncio.Task[None]
    stream: Stream | None = None
    """None until it is open."""


@dataclass
class _Entry:
    """A job that this node has business with."""

    plan: Plan
    fence: int = 0
    """Nothing of a generation below this is passed on, in or out."""
    to_worker: Deliver | None = None
    to_head: Deliver | None = None
    on_broken: Callable[[PeerId, str], None] = lambda _peer, _reason: None
    lanes: dict[tuple[PeerId, Urgency], _Lane] = field(default_factory=dict)
    sent: dict[SentKind, int] = field(default_factory=dict)


class Switch:
    """Routes tensor messages of every job on this node."""

    def __init__(
        self,
        transport: Transport,
        group: asyncio.TaskGroup,
        on_dropped: Callable[[str], None],
        on_sent: Callable[[str, int], None],
        on_transfer: OnTransfer = ignore_transfer,
        clock: Callable[[], float] = time.monotonic,
        on_span: OnSpan = ignore_span,
    ) -> None:
        """`clock` times transfers: an event loop's own may only count milliseconds."""
        self._transport = transport
        self._group = group
        self._on_dropped = on_dropped
        self._on_sent = on_sent
        self._on_transfer = on_transfer
        self._clock = clock
        self._on_span = on_span
        self._jobs: dict[JobId, _Entry] = {}
        transport.serve(TENSOR_PROTOCOL, self._accept, max_message_bytes=MAX_TENSOR_BYTES)

    def join(
        self,
        job: JobId,
        plan: Plan,
        *,
        to_worker: Deliver | None = None,
        to_head: Deliver | None = None,
        on_broken: Callable[[PeerId, str], None] | None = None,
    ) -> None:
        """Take part in `job` under `plan`; later calls update the plan and add receivers."""
        entry = self._jobs.setdefault(job, _Entry(plan))
        if plan.generation > entry.plan.generation:
            # A peer that was started again has forgotten the streams of its last life, and an
            # idle stream does not notice; what is queued is of an older generation anyhow.
            for key in tuple(entry.lanes):
                entry.lanes.pop(key).task.cancel()
        if plan.generation >= entry.plan.generation:
            entry.plan = plan
        entry.to_worker = to_worker or entry.to_worker
        entry.to_head = to_head or entry.to_head
        entry.on_broken = on_broken or entry.on_broken

    def fence(self, job: JobId, generation: int) -> None:
        """Drop everything of `job` below `generation` from now on; the plan may come later."""
        entry = self._jobs.get(job)
        if entry is not None:
            entry.fence = max(entry.fence, generation)

    def leave(self, job: JobId, *, worker: bool = False, head: bool = False) -> None:
        """Take no more part as worker or head; with neither left the job is forgotten."""
        entry = self._jobs.get(job)
        if entry is None:
            return
        if worker:
            entry.to_worker = None
        if head:
            entry.to_head = None
        if entry.to_worker is None and entry.to_head is None:
            for lane in entry.lanes.values():
                lane.task.cancel()
            del self._jobs[job]

    def names(self, peer: PeerId, job: JobId) -> bool:
        """Whether the job's current plan names `peer`."""
        entry = self._jobs.get(job)
        return entry is not None and entry.plan.names(peer)

    def partners(self) -> frozenset[PeerId]:
        """Every other peer that a plan of a job here names."""
        plans = [entry.plan for entry in self._jobs.values()]
        named = {peer for plan in plans for peer in (plan.coordinator, *plan.workers())}
        return frozenset(named - {self._transport.peer})

    def sent(self, job: JobId) -> dict[SentKind, int]:
        """Bytes put on the wire for `job` so far, by kind."""
        entry = self._jobs.get(job)
        return dict(entry.sent) if entry else {}

    def moved(self, job: JobId) -> int:
        """A number that is another one whenever bytes of `job` have left, in the middle of a
        message too: on a slow line one may take minutes."""
        entry = self._jobs.get(job)
        lanes = entry.lanes.values() if entry else ()
        under_way = sum(lane.stream.sent_bytes for lane in lanes if lane.stream is not None)
        return under_way + sum(self.sent(job).values())

    async def send(self, message: TensorMessage, payload: bytes | memoryview = b"") -> None:
        """Send one message to where it belongs; waits while that peer's queue is full.

        A peer that cannot be reached is reported through the job's `on_broken`, not raised.
        """
        entry = self._jobs.get(message.job)
        if entry is None or not _is_current(entry, message):
            self._on_dropped("stale_frame")
            return
        peer = self._receiver(entry.plan, message)
        if peer == self._transport.peer:
            await self._deliver(entry, message, payload)
            return
        key = peer, urgency_of(message)
        lane = entry.lanes.get(key)
        if lane is None or lane.task.done():
            queue: asyncio.Queue[_Queued]
            queue = asyncio.Queue(MAX_QUEUED_FRAMES)
            task = self._group.create_task(
                self._pump(entry, *key, queue), name=f"tensors to {peer}"
            )
            lane = entry.lanes[key] = _Lane(queue, task)
        await lane.queue.put(_Queued(message, payload, self._clock()))

    def _receiver(self, plan: Plan, message: TensorMessage) -> PeerId:
        if isinstance(message, Frame | SessionFrame | SessionClose):
            if message.target not in plan:
                raise ProtocolError(f"no slot {message.target}")
            return plan.host(message.target)
        return plan.coordinator

    async def _deliver(
        self, entry: _Entry, message: TensorMessage, payload: bytes | bytearray | memoryview
    ) -> None:
        to_head = isinstance(message, SessionToken | SessionFailed)
        deliver = entry.to_head if to_head else entry.to_worker
        if deliver is None:
            self._on_dropped("unexpected_frame")
        else:
            await deliver(message, payload)

    async def _pump(
        self,
        entry: _Entry,
        peer: PeerId,
        urgency: Urgency,
        queue: asyncio.Queue[_Queued],
    ) -> None:
        """Send what is queued for one peer, until the stream breaks."""
        stream: Stream | None = None
        announce_s = -math.inf
        try:
            addresses = entry.plan.addresses.get(peer, ())
            stream = await self._transport.open(
                peer, addresses, TENSOR_PROTOCOL,
                max_message_bytes=MAX_TENSOR_BYTES, urgency=urgency,
            )  # fmt: skip
            lane = entry.lanes.get((peer, urgency))
            if lane is not None and lane.queue is queue:
                lane.stream = stream
            while True:
                message, payload, queued_s = await queue.get()
                if not _is_current(entry, message):
                    continue
                header, began_s = pack(message), self._clock()
                async with asyncio.timeout(MIN_TIMEOUT_S + len(payload) / MIN_BYTES_PER_S):
                    if len(payload) >= LARGE_BYTES and self._clock() >= announce_s:
                        announce_s = self._clock() + ANNOUNCE_EVERY_S
                        await stream.send(pack(Announce(message.job)))
                    await stream.send(header, payload)
                kind: SentKind = message.kind if isinstance(message, Frame) else "session"
                num_bytes = len(header) + len(payload)
                entry.sent[kind] = entry.sent.get(kind, 0) + num_bytes
                self._on_sent(kind, num_bytes)
                if isinstance(message, Frame):
                    facts = {**_facts(message), "queued_s": queued_s, "bytes": num_bytes}
                    self._on_span("send", began_s, self._clock(), **facts)
        except (PeerError, TimeoutError) as error:
            entry.on_broken(peer, str(error) or "takes nothing off the wire")
        finally:
            try:
                if stream is not None:
                    await stream.reset()
            finally:
                while not queue.empty():  # whoever waits for room finds the lane closed
                    queue.get_nowait()

    async def _accept(self, stream: Stream) -> None:
        """Serve one incoming tensor stream, of a peer that some plan names."""
        if not any(entry.plan.names(stream.peer) for entry in self._jobs.values()):
            self._on_dropped("refused_peer")
            raise ProtocolError(f"{stream.peer} has no part in any job here")
        arrivals = ArrivalClock(self._clock())
        while True:
            try:
                asked_s = self._clock()
                data = await stream.receive()
                now_s = self._clock()
                message, payload = unpack(data)
            except (EndOfStream, PeerLostError):
                return
            except ProtocolError:
                self._on_dropped("bad_frame")
                raise
            if isinstance(message, Announce):
                arrivals.announced(asked_s, now_s)
                continue
            if (seconds := arrivals.arrived(now_s)) is not None:
                self._on_transfer(stream.peer, len(data), seconds)
            if not isinstance(message, TensorMessage):
                self._on_dropped("bad_frame")
                raise ProtocolError(f"{type(message).__name__} on a tensor stream")
            if isinstance(message, Frame):
                self._on_span("receive", asked_s, now_s, **_facts(message))
            await self._admit(stream.peer, message, payload)

    async def _admit(self, peer: PeerId, message: TensorMessage, payload: memoryview) -> None:
        entry = self._jobs.get(message.job)
        if entry is None or not entry.plan.names(peer):
            self._on_dropped("refused_peer")
            raise ProtocolError(f"{peer} has no part in job {message.job}")
        if not _is_current(entry, message):
            self._on_dropped("stale_frame")
            return
        if self._receiver(entry.plan, message) != self._transport.peer:
            self._on_dropped("misrouted_frame")
            return
        expected = _sender(entry.plan, message)
        if expected is not None and expected != peer:
            self._on_dropped("foreign_frame")
            raise ProtocolError(f"{peer} does not host the slot that it writes for")
        await self._deliver(entry, message, payload)


def urgency_of(message: TensorMessage) -> Urgency:
    """What may go before what: whoever waits for a hidden state has nothing else to do."""
    if not isinstance(message, Frame) or message.kind == "activation":
        return Urgency.FORWARD
    return Urgency.BACKWARD if message.kind == "activation_gradient" else Urgency.REDUCTION


def _is_current(entry: _Entry, message: TensorMessage) -> bool:
    return message.generation == entry.plan.generation >= entry.fence


def _facts(frame: Frame) -> dict[str, Fact]:
    """What tells a frame from all others of its job, for a trace."""
    return {
        "job": frame.job, "kind": frame.kind, "step": frame.step, "evaluate": frame.evaluate,
        "source": tuple(frame.source), "target": tuple(frame.target),
        "microbatch": frame.microbatch, "group": frame.group, "part": frame.part,
    }  # fmt: skip


def _sender(plan: Plan, message: Message) -> PeerId | None:
    """Who alone may send `message` under `plan`; None if any peer of the plan may."""
    if isinstance(message, Frame):
        if message.source not in plan:
            raise ProtocolError(f"no slot {message.source}")
        return plan.host(message.source)
    return None
