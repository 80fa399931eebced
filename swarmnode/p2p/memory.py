"""A network in one process, on asyncio alone: no thread, no socket, no real clock.

It makes the same promises as the real one, so the whole swarm runs on a virtual clock.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Protocol

from swarmnode.domain import PeerId
from swarmnode.errors import FrameTooLargeError, PeerError, PeerLostError, RefusedError
from swarmnode.p2p import framing
from swarmnode.p2p.ports import Buffer, EndOfStream, Handler, Stream, Urgency

_log = logging.getLogger(__name__)


class LeavableStream(Stream, Protocol):
    """A stream that its handler's end can close in good order."""

    async def leave(self) -> None:
        """Close both ways; the peer still receives what was sent."""


async def run_handler(handler: Handler, stream: LeavableStream, protocol: str) -> None:
    """Run `handler` on an incoming stream; close the stream when it returns, reset if it fails."""
    is_done = False
    try:
        await handler(stream)
        await stream.leave()
        is_done = True
    except (PeerError, EndOfStream) as error:
        _log.info("%s with %s ended: %s", protocol, stream.peer, str(error) or "closed")
    except Exception:
        _log.exception("handler of %s failed with %s", protocol, stream.peer)
    finally:
        if not is_done:
            await stream.reset()


class MemoryStream:
    """One end of an in-process stream."""

    def __init__(self, peer: PeerId, max_message_bytes: int) -> None:
        self._peer = peer
        self._max_message_bytes = max_message_bytes
        self._other = self
        self._messages: deque[bytearray] = deque()
        self._queued_bytes = 0
        self._num_waiting_readers = 0
        self._waiters: set[asyncio.Future[None]] = set()
        self._send_lock = asyncio.Lock()
        self._end: Exception | None = None
        self._broken: str | None = None
        self._is_ended_by_us = False
        self.sent_bytes = 0

    @property
    def peer(self) -> PeerId:
        return self._peer

    @property
    def is_over(self) -> bool:
        """Whether nothing more can happen here but the reading of what has arrived."""
        return self._broken is not None or (self._is_ended_by_us and self._end is not None)

    async def send(self, *parts: Buffer) -> None:
        """See `ports.Stream`. A send that is cancelled while it waits leaves no trace."""
        assert not self._is_ended_by_us, "send after close_write"
        message = bytearray().join(parts)
        if len(message) > self._max_message_bytes:
            raise FrameTooLargeError(len(message), self._max_message_bytes)
        async with self._send_lock:
            await self._wait_until(
                lambda: self._broken is not None or self._other._has_room(message)
            )
            if self._broken is not None:
                raise PeerLostError(self._peer, self._broken)
            self.sent_bytes += len(message)
            self._other._put(message)

    async def receive(self) -> bytes | bytearray:
        """See `ports.Stream`."""
        self._num_waiting_readers += 1
        self._other._wake()
        try:
            await self._wait_until(lambda: bool(self._messages) or self._end is not None)
        finally:
            self._num_waiting_readers -= 1
        if not self._messages:
            assert self._end is not None
            raise self._end
        message = self._messages.popleft()
        self._queued_bytes -= framing.cost_bytes(message)
        self._other._wake()
        return message

    async def close_write(self) -> None:
        """See `ports.Stream`."""
        self._is_ended_by_us = True
        self._other._finish(EndOfStream())

    async def reset(self) -> None:
        """See `ports.Stream`."""
        self._messages.clear()
        self.break_off("the stream was reset here", "the peer reset the stream")

    async def leave(self) -> None:
        """Close both ways; the peer still receives what was sent."""
        await self.close_write()
        self.break_off("the stream is closed", "the peer has left the stream")

    def break_off(self, reason_here: str, reason_there: str) -> None:
        """Break both ends; what has arrived can still be received."""
        self._break(PeerLostError(self._peer, reason_here))
        self._other._break(PeerLostError(self._other._peer, reason_there))

    def _has_room(self, message: bytearray) -> bool:
        is_waited_for = not self._messages and self._num_waiting_readers > 0
        total_bytes = self._queued_bytes + framing.cost_bytes(message)
        return is_waited_for or total_bytes <= framing.WINDOW_BYTES

    def _put(self, message: bytearray) -> None:
        if len(message) > self._max_message_bytes:
            self._break(FrameTooLargeError(len(message), self._max_message_bytes))
            self._other._break(PeerLostError(self._other._peer, "the peer reset the stream"))
            return
        self._messages.append(message)
        self._queued_bytes += framing.cost_bytes(message)
        self._wake()

    def _finish(self, error: Exception) -> None:
        self._end = self._end or error
        self._wake()

    def _break(self, error: Exception) -> None:
        self._broken = self._broken or str(getattr(error, "reason", error))
        self._finish(error)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _wait_until(self, is_true: Callable[[], bool]) -> None:
        while not is_true():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)


def stream_pair(
    here: PeerId, here_max_bytes: int, there: PeerId, there_max_bytes: int
) -> tuple[MemoryStream, MemoryStream]:
    """Return two ends that are joined: the one that `here` holds, and the one of `there`."""
    ours, theirs = MemoryStream(there, here_max_bytes), MemoryStream(here, there_max_bytes)
    ours._other, theirs._other = theirs, ours
    return ours, theirs


class MemoryTransport:
    """A peer's view of the network. Implements `ports.Transport`."""

    def __init__(self, network: "MemoryNetwork", peer: PeerId) -> None:
        self._network = network
        self._peer = peer
        self._handlers: dict[str, tuple[Handler, int]] = {}
        self._streams: list[MemoryStream] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_dead = False

    @property
    def peer(self) -> PeerId:
        return self._peer

    @property
    def addresses(self) -> Sequence[str]:
        return (f"/memory/{self._peer}/p2p/{self._peer}",)

    def serve(
        self,
        protocol: str,
        handler: Handler,
        *,
        max_message_bytes: int,
        urgency: Urgency = Urgency.CONTROL,  # noqa: ARG002  here nothing takes time
    ) -> None:
        """See `ports.Transport`."""
        self._handlers[protocol] = (handler, max_message_bytes)

    async def open(
        self,
        peer: PeerId,
        addresses: Sequence[str],  # noqa: ARG002  the network knows every address
        protocol: str,
        *,
        max_message_bytes: int,
        urgency: Urgency = Urgency.CONTROL,  # noqa: ARG002
    ) -> MemoryStream:
        """See `ports.Transport`."""
        await asyncio.sleep(0)  # as the real one, it never answers before it has been awaited
        other = self._network.reach(peer)
        if self._is_dead or other is None:
            raise PeerLostError(peer, "unreachable")
        if protocol not in other._handlers:
            raise RefusedError(peer, f"does not serve {protocol}")
        handler, their_max_bytes = other._handlers[protocol]
        ours, theirs = stream_pair(self._peer, max_message_bytes, peer, their_max_bytes)
        self._keep(ours)
        other._keep(theirs)
        other._start(run_handler(handler, theirs, protocol))
        return ours

    async def disconnect(self, peer: PeerId) -> None:
        """See `ports.Transport`."""
        for stream in self._streams:
            if stream.peer == peer:
                stream.break_off("disconnected", "the peer has disconnected")

    def kill(self) -> None:
        """Die at once: every stream breaks, every handler is cancelled."""
        self._is_dead = True
        for stream in self._streams:
            stream.break_off("the transport has stopped", "the peer is gone")
        for task in self._tasks:
            task.cancel()

    def _keep(self, stream: MemoryStream) -> None:
        self._streams = [old for old in self._streams if not old.is_over] + [stream]

    def _start(self, run: Coroutine[None, None, None]) -> None:
        self._tasks.add(task := self._network.start_task(run))
        task.add_done_callback(self._tasks.discard)


class MemoryNetwork:
    """Peers that reach each other by id. `async with MemoryNetwork() as network`."""

    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()
        self._transports: dict[PeerId, MemoryTransport] = {}

    async def __aenter__(self) -> "MemoryNetwork":
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for peer in sorted(self._transports):
            self.kill(peer)
        await self._group.__aexit__(kind, error, trace)

    def transport(self, peer: PeerId) -> MemoryTransport:
        """Return a live transport of `peer`: the same one until it is killed, then a new one."""
        transport = self.reach(peer)
        if transport is None:
            transport = self._transports[peer] = MemoryTransport(self, peer)
        return transport

    def reach(self, peer: PeerId) -> MemoryTransport | None:
        """Return the transport of `peer` if it lives."""
        transport = self._transports.get(peer)
        return None if transport is None or transport._is_dead else transport

    def kill(self, peer: PeerId) -> None:
        """Let `peer` die as a process does: without a word, with all its streams."""
        if (transport := self.reach(peer)) is not None:
            transport.kill()

    def start_task(self, run: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run a handler as long as the network lasts."""
        return self._group.create_task(run, name="memory-handler")
