"""Streams over py-libp2p for asyncio: TCP, Noise and yamux in a trio thread of their own.

py-libp2p is imported only when a transport starts: it takes 80 MB and half a second.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from swarmnode.domain import PeerId
from swarmnode.errors import FrameTooLargeError, PeerLostError, RefusedError
from swarmnode.p2p.memory import LeavableStream, run_handler, stream_pair
from swarmnode.p2p.ports import Buffer, Handler, Stream, Urgency
from swarmnode.p2p.trio_bridge import TrioBridge

if TYPE_CHECKING:
    from swarmnode.p2p.channel import Channel, Inbox, NetStream
    from swarmnode.p2p.host import Host

OPEN_TIMEOUT_S = 10.0
"""Seconds until a peer that does not answer counts as unreachable."""


class Libp2pStream:
    """The asyncio half of a stream. Implements `ports.Stream`."""

    def __init__(
        self,
        bridge: "TrioBridge[Host]",
        peer: PeerId,
        max_message_bytes: int,
        places: threading.Semaphore,
        make: "Callable[[Inbox], Channel]",
    ) -> None:
        from swarmnode.p2p.channel import Inbox

        self._bridge = bridge
        self._peer = peer
        self._max_message_bytes = max_message_bytes
        self._inbox = Inbox(partial(bridge.tell, self._wake), places)
        self._channel = make(self._inbox)
        self._waiter: asyncio.Future[None] | None = None
        self._send_lock = asyncio.Lock()
        self._receive_lock = asyncio.Lock()
        self._is_ended_by_us = False

    @property
    def peer(self) -> PeerId:
        return self._peer

    @property
    def sent_bytes(self) -> int:
        return self._channel.sent_bytes

    async def send(self, *parts: Buffer) -> None:
        """See `ports.Stream`.

        Cancelled before its first byte has left, a message is withdrawn; after that, a message
        cannot be taken back, and the stream is reset.
        """
        assert not self._is_ended_by_us, "send after close_write"
        num_bytes = sum(memoryview(part).nbytes for part in parts)
        if num_bytes > self._max_message_bytes:
            raise FrameTooLargeError(num_bytes, self._max_message_bytes)
        async with self._send_lock:
            try:
                await self._bridge.call(self._channel.send, parts)
            except trio.RunFinishedError as error:
                raise PeerLostError(self._peer, "the transport has stopped") from error

    async def receive(self) -> bytes | bytearray:
        """See `ports.Stream`. Cancelling it loses nothing."""
        async with self._receive_lock:
            while True:
                waiter = self._waiter = self._bridge.new_future()
                message, credit_bytes = self._inbox.take()
                if credit_bytes:
                    self._bridge.post_task(self._channel.grant, credit_bytes)
                if message is not None:
                    return message
                try:
                    await waiter
                finally:
                    self._inbox.stop_waiting()

    async def close_write(self) -> None:
        """See `ports.Stream`."""
        self._is_ended_by_us = True
        async with self._send_lock:
            await self._call_quietly(self._channel.close_write)

    async def leave(self) -> None:
        """Close both ways; the peer still receives what was sent. What it sends is dropped."""
        self._is_ended_by_us = True
        self._inbox.drop()
        async with self._send_lock:
            await self._call_quietly(self._channel.leave)

    async def reset(self) -> None:
        """See `ports.Stream`."""
        self._inbox.drop()
        await self._call_quietly(self._channel.reset)

    async def run_channel(self) -> None:
        """Read the wire until the stream ends. Runs on the trio side."""
        await self._channel.run()

    async def _call_quietly(self, function: Callable[[], Any]) -> None:
        with suppress(trio.RunFinishedError):
            await self._bridge.call(function)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Libp2pTransport:
    """Implements `ports.Transport`. `async with Libp2pTransport.start(seed, listen) as it`."""

    def __init__(
        self,
        bridge: "TrioBridge[Host]",
        group: asyncio.TaskGroup,
        announce: Sequence[str],
        open_timeout_s: float,
    ) -> None:
        self._bridge = bridge
        self._group = group
        self._peer = PeerId(bridge.resource.peer)
        self._addresses = bridge.resource.addresses(announce)
        self._open_timeout_s = open_timeout_s
        self._handlers: dict[str, tuple[Handler, int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    @asynccontextmanager
    async def start(
        cls,
        seed: bytes,
        listen: Sequence[str],
        announce: Sequence[str] = (),
        *,
        open_timeout_s: float = OPEN_TIMEOUT_S,
    ) -> AsyncIterator["Libp2pTransport"]:
        """Listen on multiaddrs such as /ip4/0.0.0.0/tcp/4001; stop everything on the way out.

        `seed`: 32 bytes, the Ed25519 private key. `announce`: what others dial if that is not
        where we listen, as behind a router. If the trio thread dies, the block is cancelled and
        trio.RunFinishedError comes out.
        Raises: OSError if an address cannot be listened on.
        """
        from swarmnode.p2p.host import Host

        async with AsyncExitStack() as stack:
            bridge = await stack.enter_async_context(
                TrioBridge.start("swarmnode-libp2p", lambda: Host.start(seed, listen))
            )
            group = await stack.enter_async_context(asyncio.TaskGroup())
            watch = group.create_task(bridge.wait_crashed(), name="libp2p-watch")
            transport = cls(bridge, group, announce, open_timeout_s)
            try:
                yield transport
            finally:
                for task in (watch, *transport._tasks):
                    task.cancel()

    @property
    def peer(self) -> PeerId:
        return self._peer

    @property
    def addresses(self) -> Sequence[str]:
        return self._addresses

    def serve(
        self,
        protocol: str,
        handler: Handler,
        *,
        max_message_bytes: int,
        urgency: Urgency = Urgency.CONTROL,
    ) -> None:
        """See `ports.Transport`."""
        self._handlers[protocol] = (handler, max_message_bytes)

        async def on_stream(stream: "NetStream", peer: str) -> None:
            ours = self._wrap(stream, PeerId(peer), max_message_bytes, urgency)
            self._bridge.tell(self._start_handler, handler, ours, protocol)
            await ours.run_channel()

        self._bridge.post(self._bridge.resource.serve, protocol, on_stream)

    async def open(
        self,
        peer: PeerId,
        addresses: Sequence[str],
        protocol: str,
        *,
        max_message_bytes: int,
        urgency: Urgency = Urgency.CONTROL,
    ) -> Stream:
        """See `ports.Transport`."""
        if peer == self._peer:
            return self._open_to_self(protocol, max_message_bytes)
        try:
            stream = await self._bridge.call(
                self._bridge.resource.open, peer, addresses, protocol, self._open_timeout_s,
                dispose=lambda unwanted: unwanted.reset(),
            )  # fmt: skip
        except trio.RunFinishedError as error:
            raise PeerLostError(peer, "the transport has stopped") from error
        ours = self._wrap(stream, peer, max_message_bytes, urgency)
        self._bridge.post_task(ours.run_channel)
        return ours

    async def disconnect(self, peer: PeerId) -> None:
        """See `ports.Transport`."""
        with suppress(trio.RunFinishedError):
            await self._bridge.call(self._bridge.resource.disconnect, peer)

    def _open_to_self(self, protocol: str, max_message_bytes: int) -> Stream:
        if protocol not in self._handlers:
            raise RefusedError(self._peer, f"does not serve {protocol}")
        handler, their_max_bytes = self._handlers[protocol]
        ours, theirs = stream_pair(self._peer, max_message_bytes, self._peer, their_max_bytes)
        self._start_handler(handler, theirs, protocol)
        return ours

    def _wrap(
        self, stream: "NetStream", peer: PeerId, max_message_bytes: int, urgency: Urgency
    ) -> Libp2pStream:
        from swarmnode.p2p.channel import Channel

        def make(inbox: "Inbox") -> "Channel":
            turns = self._bridge.resource.turns
            return Channel(stream, peer, inbox, max_message_bytes, turns, urgency)

        places = stream.muxed_stream.conn.wide_places
        return Libp2pStream(self._bridge, peer, max_message_bytes, places, make)

    def _start_handler(self, handler: Handler, stream: LeavableStream, protocol: str) -> None:
        run = run_handler(handler, stream, protocol)
        self._tasks.add(task := self._group.create_task(run, name=f"serve {protocol}"))
        task.add_done_callback(self._tasks.discard)
