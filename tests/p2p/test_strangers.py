"""A host that anybody may dial stays up: raw bytes of a stranger at each stage of a connection."""

import asyncio
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest
import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_PROTOCOL_ID
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr
from transport_worlds import LOOPBACK, echo

from swarmnode.p2p.buffered import NOISE_PROTOCOL_ID, BufferedNoise, key_pair_from_seed
from swarmnode.p2p.host import MAX_STREAMS_PER_PEER, Host
from swarmnode.p2p.streams import Libp2pTransport
from swarmnode.p2p.trio_bridge import TrioBridge

DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
MULTISTREAM = b"\x13/multistream/1.0.0\n"


def line(text: bytes) -> bytes:
    """A message of multistream-select."""
    return bytes([len(text) + 1]) + text + b"\n"


def frame(kind: int, flags: int, stream: int, length: int, body: bytes = b"") -> bytes:
    """A frame of yamux; `length` need not be that of the body."""
    return struct.pack("!BBHII", 0, kind, flags, stream, length) + body


NOT_UTF8 = b"\x02\xff\n"
PING_OURS = frame(PING, SYN, 0, 0xBEEF)
PONG = frame(PING, ACK, 0, 0xBEEF)

NEGOTIATION = {
    "not UTF-8": NOT_UTF8,
    "not UTF-8, after the greeting": MULTISTREAM + NOT_UTF8,
    "an endless number": b"\xff" * 16,
    "a huge message": b"\xff" * 8 + b"\x7f" + b"x",
    "an empty message": b"\x00",
    "no newline": b"\x02xx",
    "another protocol": line(b"/other/1.0.0"),
    "nothing of ours": MULTISTREAM + line(b"ls") + line(b"") + line(b"/nothing/1"),
}
"""First bytes where multistream-select is spoken: on the wire, for the muxer, on a stream."""

LONG_MESSAGE = b"\xff\xff\xff\xff\x07"
"""The length of one of 2 GiB."""

NOISE = MULTISTREAM + line(b"/noise")
HANDSHAKE = {
    "nothing": NOISE,
    "an empty message": NOISE + b"\x00\x00",
    "a short key": NOISE + b"\x00\x05hello",
    "a zero key": NOISE + b"\x00\x20" + bytes(32),
    "a long message": NOISE + b"\xff\xff" + bytes(0xFFFF),
    "a wrong second message": NOISE + b"\x00\x20" + b"k" * 32 + b"\x00\x80" + b"w" * 128,
}

DEFAULT_PROTOCOLS = {
    f"{protocol} {len(body)}": MULTISTREAM + line(protocol.encode()) + body
    for protocol in ("/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0", "/ipfs/ping/1.0.0")
    for body in (b"", b"x", b"\x05" + b"\xff" * 5, b"\xff" * 40, b"\x80\x80\x80\x80\x80\x80")
}
"""What py-libp2p would serve unasked."""

MUXER = {
    "an unknown type": frame(9, 0, 1, 7),
    "an unknown version": b"\x07" + frame(DATA, SYN, 1, 0)[1:],
    "an announced 4 GiB": frame(DATA, SYN, 1, 0xFFFFFFFF),
    "an overflowing window": frame(WINDOW_UPDATE, SYN, 1, 0xFFFFFFFF)
    + frame(WINDOW_UPDATE, 0, 1, 0xFFFFFFFF),
    "more than the window": frame(DATA, SYN, 1, 1 << 20, bytes(1 << 20)),
    "begun and ended at once": frame(DATA, SYN | FIN, 1, 0),
    "begun and reset at once": frame(DATA, SYN | RST, 1, 0),
    "begun, reset and with data": frame(DATA, SYN | RST, 1, 3, NOT_UTF8),
    "begun twice": frame(DATA, SYN, 1, 0) * 2,
    "a number that is ours": frame(DATA, SYN, 2, 0) + frame(DATA, SYN, 0, 0),
    "data for no stream": frame(DATA, 0, 77, 3, NOT_UTF8) + frame(DATA, ACK, 77, 3, NOT_UTF8),
    "an answer to no ping": frame(PING, ACK, 0, 5),
    "a goodbye without a reason": frame(GO_AWAY, 0, 0, 99),
    "no frame": b"GET / HTTP/1.1\r\nA: b\r\n\r\n",
}


@asynccontextmanager
async def public_host() -> AsyncIterator[Libp2pTransport]:
    """A host that serves /echo/1; the block is cancelled, with the cause, if it crashes."""
    async with Libp2pTransport.start(b"a" * 32, LOOPBACK) as host:
        host.serve("/echo/1", echo, max_message_bytes=10)
        yield host


async def greet(host: Libp2pTransport) -> None:
    """Be an honest peer that is served. Raises: PeerLostError or TimeoutError if it is not."""
    async with asyncio.timeout(5), Libp2pTransport.start(b"b" * 32, LOOPBACK) as peer:
        stream = await peer.open(host.peer, host.addresses, "/echo/1", max_message_bytes=10)
        await stream.send(b"x")
        assert await stream.receive() == b"x"


async def dial_bare(host: Libp2pTransport) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    port = int(Multiaddr(host.addresses[0]).value_for_protocol("tcp"))
    return await asyncio.open_connection("127.0.0.1", port)


async def send_bare(host: Libp2pTransport, wire: bytes) -> None:
    """Send `wire` and no more, and wait until the host hangs up."""
    reader, writer = await dial_bare(host)
    writer.write(wire)
    writer.write_eof()
    async with asyncio.timeout(5):
        with suppress(ConnectionResetError):
            await reader.read()
    writer.close()


@asynccontextmanager
async def stranger() -> AsyncIterator[TransportUpgrader]:
    """What secures connections, with a key that nobody knows."""
    async with trio.open_nursery() as nursery:
        noise = BufferedNoise(key_pair_from_seed(b"s" * 32), nursery.start_soon)
        try:
            yield TransportUpgrader({NOISE_PROTOCOL_ID: noise}, {YAMUX_PROTOCOL_ID: Yamux})
        finally:
            noise.abort_all()
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def secure(upgrader: TransportUpgrader, address: str) -> AsyncIterator[Any]:
    """A secured connection for which no muxer is negotiated yet."""
    where, _, peer = address.rpartition("/p2p/")
    raw = await TCP().dial(Multiaddr(where))
    try:
        yield await upgrader.upgrade_security(raw, True, ID.from_string(peer))
    finally:
        raw.stream.stream.socket.close()


async def hang_up(connection: Any) -> None:
    """Say that no more comes, and wait until the host hangs up."""
    while connection.raw._queued_bytes:
        await connection.raw._drained.wait()
    await connection.raw._inner.stream.stream.send_eof()
    while await connection.read(1):
        pass


async def send_secured(upgrader: TransportUpgrader, address: str, wire: bytes) -> None:
    """Send `wire` where a muxer would be negotiated."""
    with trio.fail_after(5), suppress(BaseLibp2pError, OSError, trio.BrokenResourceError):
        async with secure(upgrader, address) as connection:
            await connection.write(wire)
            await hang_up(connection)


async def send_frames(upgrader: TransportUpgrader, address: str, wire: bytes) -> bytes:
    """Send `wire` to the muxer; what comes back until it is read, or until the host hangs up."""
    answer = b""
    with trio.fail_after(5), suppress(BaseLibp2pError, OSError, trio.BrokenResourceError):
        async with secure(upgrader, address) as connection:
            await upgrader.muxer_multistream._selector.select(connection, True, 5)
            await connection.write(wire + PING_OURS)
            while PONG not in answer and (byte := await connection.read(1)):
                answer += byte
            await hang_up(connection)
    return answer


async def send_on_stream(host: Host, peer: str, addresses: Sequence[str], wire: bytes) -> None:
    """Begin a stream with `wire` and no more, and wait for its end."""
    connection = await host._dial(peer, addresses)
    stream = await connection.new_stream()
    with trio.fail_after(5), suppress(BaseLibp2pError):
        await stream.write(wire)
        await stream.close_write()
        while await stream.read(1 << 16):
            pass


async def greeted(host: Host, peer: str, addresses: Sequence[str]) -> bytes:
    """Begin a stream as one should; the greeting. Whoever ends it sooner may lose that: py-libp2p
    forgets what is unread when the other end resets a stream."""
    connection = await host._dial(peer, addresses)
    stream = await connection.new_stream()
    answer = b""
    with trio.fail_after(5):
        await stream.write(MULTISTREAM)
        while len(answer) < len(MULTISTREAM) and (chunk := await stream.read(1 << 16)):
            answer += chunk
        await stream.reset()
    return answer


@pytest.mark.parametrize("what", NEGOTIATION)
async def test_nonsense_on_the_wire_ends_that_connection_only(what: str) -> None:
    async with public_host() as host:
        await send_bare(host, NEGOTIATION[what])
        await greet(host)


@pytest.mark.parametrize("what", HANDSHAKE)
async def test_a_handshake_of_nonsense_ends_that_connection_only(what: str) -> None:
    async with public_host() as host:
        await send_bare(host, HANDSHAKE[what])
        await greet(host)


@pytest.mark.parametrize("what", NEGOTIATION)
async def test_nonsense_for_the_muxer_ends_that_connection_only(what: str) -> None:
    async with public_host() as host, TrioBridge.start("stranger", stranger) as bridge:
        address, wire = host.addresses[0], NEGOTIATION[what]
        await bridge.call(send_secured, bridge.resource, address, wire)
        await greet(host)


@pytest.mark.parametrize("what", MUXER)
async def test_frames_against_the_rules_end_that_connection_at_most(what: str) -> None:
    async with public_host() as host, TrioBridge.start("stranger", stranger) as bridge:
        await bridge.call(send_frames, bridge.resource, host.addresses[0], MUXER[what])
        await greet(host)


@pytest.mark.parametrize("what", NEGOTIATION | DEFAULT_PROTOCOLS)
async def test_nonsense_on_a_stream_ends_that_stream_only(what: str) -> None:
    async with (
        public_host() as host,
        TrioBridge.start("stranger", lambda: Host.start(b"s" * 32, LOOPBACK)) as bridge,
    ):
        wire = (NEGOTIATION | DEFAULT_PROTOCOLS)[what]
        where = (host.peer, list(host.addresses))
        await bridge.call(send_on_stream, bridge.resource, *where, wire)
        assert await bridge.call(greeted, bridge.resource, *where) == MULTISTREAM, (
            "on the same line"
        )
        await greet(host)


async def visit_often(upgrader: TransportUpgrader, address: str, count: int) -> None:
    """Connect and hang up, again and again, as fast as the host lets us."""
    for _ in range(count):
        async with secure(upgrader, address) as connection:
            await upgrader.muxer_multistream._selector.select(connection, True, 5)
            await hang_up(connection)


async def test_a_connection_that_has_ended_gives_its_place_back() -> None:
    """py-libp2p has 250 places for those who dial."""
    async with public_host() as host, TrioBridge.start("stranger", stranger) as bridge:
        await bridge.call(visit_often, bridge.resource, host.addresses[0], 260)
        await greet(host)


async def test_handshakes_that_nobody_finishes_keep_nobody_out() -> None:
    async with public_host() as host, AsyncExitStack() as stack:
        for _ in range(300):
            reader, writer = await dial_bare(host)
            stack.callback(writer.close)
            await reader.read(1)  # an answer, unless it is turned away
        await greet(host)


async def test_what_a_stranger_announces_is_not_collected() -> None:
    """Of a message of 1 GiB in the first line, before anybody is known."""
    chunk, num_sent = bytes(1 << 20), 0
    async with public_host() as host:
        _, writer = await dial_bare(host)
        writer.write(MULTISTREAM + b"\x80\x80\x80\x80\x04")
        with suppress(ConnectionError):
            async with asyncio.timeout(5):
                while num_sent < 128:
                    writer.write(chunk)
                    await writer.drain()
                    num_sent += 1
        writer.close()
        await greet(host)
    assert num_sent < 128


@pytest.mark.parametrize("num_streams", [1, 20])
async def test_a_stranger_who_exceeds_the_window_is_hung_up_on(num_streams: int) -> None:
    """Nobody reads that fast, and streams that were refused nobody reads at all."""
    size = 4 << 20
    wire = b"".join(
        frame(DATA, SYN if number < num_streams else 0, 1 + 2 * (number % num_streams), size)
        + LONG_MESSAGE
        + bytes(size - len(LONG_MESSAGE))
        for number in range(40)
    )
    async with public_host() as host, TrioBridge.start("stranger", stranger) as bridge:
        address = host.addresses[0]
        answer = await bridge.call(send_frames, bridge.resource, address, wire)
        assert PONG not in answer
        await greet(host)


async def test_a_stranger_has_a_bounded_number_of_streams() -> None:
    """Also of those of which the protocol is never said."""
    count = MAX_STREAMS_PER_PEER + 80
    wire = b"".join(frame(DATA, SYN, 1 + 2 * number, 0) for number in range(count))
    async with public_host() as host, TrioBridge.start("stranger", stranger) as bridge:
        address = host.addresses[0]
        answer = await bridge.call(send_frames, bridge.resource, address, wire)
        assert answer.count(frame(WINDOW_UPDATE, RST, 0, 0)[:4]) >= 50
        await greet(host)
