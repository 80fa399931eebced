"""What the rest of the program may ask of the network: two ports, no library in sight.

A message is a byte string with a known length. A stream carries messages in order between two
peers whose identity the transport has proven. Opening a stream to oneself gives an in-process one.
"""

from collections.abc import Awaitable, Callable, Sequence
from enum import IntEnum
from typing import Protocol

from swarmnode.domain import PeerId

Buffer = bytes | bytearray | memoryview


class Urgency(IntEnum):
    """What goes first on a node's lines when several streams have something to send: the least."""

    CONTROL = 0
    FORWARD = 1
    """Hidden states: whoever waits for them has nothing else to do."""
    BACKWARD = 2
    """Their gradients."""
    REDUCTION = 3
    """Parameter gradients and their sums."""
    BLOB = 4
    """Files."""


class Stream(Protocol):
    """An ordered, reliable, two-way channel of messages with one proven peer."""

    @property
    def peer(self) -> PeerId:
        """The peer at the other end, proven by its key."""

    @property
    def sent_bytes(self) -> int:
        """What has left so far, also of a message that is still under way."""

    async def send(self, *parts: Buffer) -> None:
        """Send the concatenation of `parts` as one message; return when the transport took it.

        Waits while the peer does not read (back-pressure). If it is cancelled, the message is
        withdrawn, or, where it has left in part, the stream is reset: never a torn message.
        Raises: PeerLostError if the stream is broken, FrameTooLargeError if it is over the limit.
        """

    async def receive(self) -> bytes | bytearray:
        """Return the next message. Cancelling it loses nothing.

        What arrived whole before a break is still returned.
        Raises: EndOfStream at a clean end, PeerLostError on a break, FrameTooLargeError (and
        the stream is reset) if the announced size is over the limit, before any allocation.
        """

    async def close_write(self) -> None:
        """Half-close: the peer reads to a clean end; this side can still receive."""

    async def reset(self) -> None:
        """Drop the stream at once, both ways. Idempotent, never raises."""


class EndOfStream(Exception):
    """The peer closed its side cleanly after the last message."""


Handler = Callable[[Stream], Awaitable[None]]


class Transport(Protocol):
    """Opens and accepts streams between peers."""

    @property
    def peer(self) -> PeerId:
        """Who we are."""

    @property
    def addresses(self) -> Sequence[str]:
        """Where others reach us: multiaddrs that end in /p2p/<peer>."""

    def serve(
        self,
        protocol: str,
        handler: Handler,
        *,
        max_message_bytes: int,
        urgency: Urgency = Urgency.CONTROL,
    ) -> None:
        """Run `handler` for each incoming stream of `protocol`; `urgency` is of what it sends.

        When it returns, the stream closes: the peer still receives what was sent, then
        EndOfStream. An exception in a handler resets its stream and is logged; it never ends the
        transport.
        """

    async def open(
        self,
        peer: PeerId,
        addresses: Sequence[str],
        protocol: str,
        *,
        max_message_bytes: int,
        urgency: Urgency = Urgency.CONTROL,
    ) -> Stream:
        """Open a stream to `peer`, dialling `addresses` if there is no connection yet.

        Raises: PeerLostError if it cannot be reached, RefusedError if it has no such protocol.
        """

    async def disconnect(self, peer: PeerId) -> None:
        """Close every connection with `peer`; its streams break on both sides."""
