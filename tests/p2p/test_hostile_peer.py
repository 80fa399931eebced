"""The libp2p transport against peers that do not keep the rules."""

import asyncio
import struct
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio
from libp2p import new_host
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from multiaddr import Multiaddr
from transport_worlds import LOOPBACK

from swarmnode.errors import FrameTooLargeError, PeerLostError, ProtocolError, RefusedError
from swarmnode.p2p import framing
from swarmnode.p2p.buffered import NOISE_PROTOCOL_ID, BufferedNoise, key_pair_from_seed
from swarmnode.p2p.framing import Kind
from swarmnode.p2p.host import MAX_STREAMS_PER_PEER, Host
from swarmnode.p2p.ports import Stream
from swarmnode.p2p.streams import Libp2pTransport
from swarmnode.p2p.trio_bridge import TrioBridge

KEYS = key_pair_from_seed(b"h" * 32)


@asynccontextmanager
async def bare_host(*, is_encrypted: bool) -> AsyncIterator[Any]:
    """A py-libp2p host that offers one way to secure a connection."""
    async with trio.open_nursery() as nursery:
        noise = BufferedNoise(KEYS, nursery.start_soon)
        plain = InsecureTransport(KEYS)
        host = new_host(
            key_pair=KEYS,
            sec_opt={NOISE_PROTOCOL_ID: noise} if is_encrypted else {PLAINTEXT_PROTOCOL_ID: plain},
        )
        async with host.run([Multiaddr(LOOPBACK[0])]):
            try:
                yield host
            finally:
                with trio.CancelScope(shield=True), trio.move_on_after(2):
                    noise.abort_all()
                    await host.close()
        nursery.cancel_scope.cancel()


async def dial(host: Any, address: str) -> int:
    """Connect to `address`; return the number of connections."""
    with trio.fail_after(5):
        await host.connect(info_from_p2p_addr(Multiaddr(address)))
    return len(host.get_network().get_connections())


async def addresses_of(host: Any) -> list[str]:
    await trio.lowlevel.checkpoint()
    return [str(address) for address in host.get_addrs()]


@pytest.mark.parametrize("is_encrypted", [True, False])
async def test_only_an_encrypted_peer_gets_in(is_encrypted: bool) -> None:
    def context() -> Any:
        return bare_host(is_encrypted=is_encrypted)

    async with (
        Libp2pTransport.start(b"a" * 32, LOOPBACK) as transport,
        TrioBridge.start("stranger", context) as stranger,
    ):
        dialled = stranger.call(dial, stranger.resource, transport.addresses[0])
        if is_encrypted:
            assert await dialled == 1
        else:
            with pytest.raises(BaseLibp2pError):
                await dialled


@pytest.mark.parametrize("is_encrypted", [True, False])
async def test_only_an_encrypted_peer_is_dialled(is_encrypted: bool) -> None:
    def context() -> Any:
        return bare_host(is_encrypted=is_encrypted)

    async with (
        Libp2pTransport.start(b"a" * 32, LOOPBACK) as transport,
        TrioBridge.start("stranger", context) as stranger,
    ):
        addresses = await stranger.call(addresses_of, stranger.resource)
        peer = addresses[0].rpartition("/p2p/")[2]
        expected = RefusedError if is_encrypted else PeerLostError
        with pytest.raises(expected, match="does not serve" if is_encrypted else "/noise"):
            await transport.open(peer, addresses, "/x/1", max_message_bytes=1)


async def write_raw(host: Host, peer: str, addresses: list[str], wire: bytes) -> bytes:
    """Write `wire` on a stream of /victim/1 and return what comes until the stream breaks."""
    stream: Any = await host.open(peer, addresses, "/victim/1", 5.0)
    answer = b""
    try:
        await stream.write(wire)
        while True:
            answer += await stream.read(1 << 16)
    except BaseLibp2pError:
        return answer


async def receive_error(wire: bytes) -> tuple[BaseException, int]:
    """Return what a handler gets from a peer that writes `wire`, and the peak of our memory."""
    errors: asyncio.Queue[BaseException] = asyncio.Queue()

    async def handler(stream: Stream) -> None:
        try:
            await stream.receive()
        except Exception as error:
            errors.put_nowait(error)

    async with (
        Libp2pTransport.start(b"a" * 32, LOOPBACK) as transport,
        TrioBridge.start("hostile", lambda: Host.start(b"h" * 32, LOOPBACK)) as hostile,
    ):
        transport.serve("/victim/1", handler, max_message_bytes=1 << 20)
        tracemalloc.start()
        try:
            async with asyncio.timeout(10):
                await hostile.call(
                    write_raw, hostile.resource, transport.peer, list(transport.addresses), wire
                )
                error = await errors.get()
            return error, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()


async def test_an_announced_two_gibibytes_are_refused_before_allocation() -> None:
    wire = framing.encode_control(Kind.DATA, 1004) + (1 << 31).to_bytes(4, "big") + bytes(1000)
    error, peak_bytes = await receive_error(wire)
    assert isinstance(error, FrameTooLargeError)
    assert (error.num_bytes, error.max_bytes) == (1 << 31, 1 << 20)
    assert peak_bytes < 16 << 20


async def test_nonsense_breaks_the_stream() -> None:
    error, _ = await receive_error(b"GET / HTTP/1.1\r\n\r\n")
    assert isinstance(error, ProtocolError)


class Decoded:
    """What the decoders of a test are fed, and whether another trio task had its turn between."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chunks: list[tuple[int, int]] = []
        """Bytes, and turns that the other task has had so far."""
        self._num_turns = 0
        feed = framing.Decoder.feed

        def observed(decoder: framing.Decoder, chunk: bytes) -> list[framing.Event]:
            self.chunks.append((len(chunk), self._num_turns))
            return feed(decoder, chunk)

        monkeypatch.setattr(framing.Decoder, "feed", observed)

    async def take_turns(self) -> None:
        while True:
            await trio.lowlevel.checkpoint()
            self._num_turns += 1

    def check_slices(self) -> None:
        sizes, turns = zip(*self.chunks, strict=True)
        assert max(sizes) <= 64 << 10
        # trio runs all that can run once, in any order, before it runs one of them again
        assert all(before < after for before, after in zip(turns, turns[2:], strict=False))


async def write_frame(host: Host, peer: str, addresses: list[str], wire: bytes) -> None:
    """Put `wire` into one frame of the muxer; return when the stream breaks."""
    stream: Any = await host.open(peer, addresses, "/victim/1", 5.0)
    muxed = stream.muxed_stream
    header = struct.pack("!BBHII", 0, 0, 0, muxed.stream_id, len(wire))
    await muxed.conn._write_frame(header + wire)
    with suppress(BaseLibp2pError):
        while True:
            await stream.read(1 << 16)


CREDIT_FLOODS = {
    "of nothing": framing.encode_control(Kind.CREDIT, 1),
    "of enough": framing.encode_control(Kind.CREDIT, framing.LEAST_CREDIT_BYTES),
    "of much": framing.encode_control(Kind.CREDIT, (1 << 30) - 1),
}


@pytest.mark.parametrize("what", CREDIT_FLOODS)
async def test_a_flood_of_credit_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """One frame of 4 Mi records, the largest that the muxer takes."""
    errors: asyncio.Queue[Exception] = asyncio.Queue()

    async def handler(stream: Stream) -> None:
        try:
            await stream.receive()
        except ProtocolError as error:
            errors.put_nowait(error)

    decoded = Decoded(monkeypatch)
    async with (
        Libp2pTransport.start(b"a" * 32, LOOPBACK) as transport,
        TrioBridge.start("hostile", lambda: Host.start(b"h" * 32, LOOPBACK)) as hostile,
    ):
        transport.serve("/victim/1", handler, max_message_bytes=1 << 20)
        where = (transport.peer, list(transport.addresses))
        flood = CREDIT_FLOODS[what] * (4 << 20)
        tracemalloc.start()
        try:
            async with asyncio.timeout(20):
                await hostile.call(write_frame, hostile.resource, *where, flood)
                await errors.get()
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert [num_bytes for num_bytes, _ in decoded.chunks] == [64 << 10]
    assert peak_bytes < 10 * len(flood)  # copies of the frame on both sides, nothing for a record


async def test_a_message_in_crumbs_leaves_others_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stranger may send each byte in a record of its own, all of them in one frame."""
    body = bytes(range(256)) * 512
    crumbs = [framing.encode_control(Kind.DATA, 1) + bytes([byte]) for byte in body]
    start = framing.encode_control(Kind.DATA, 4) + len(body).to_bytes(4, "big")
    decoded = Decoded(monkeypatch)
    received: asyncio.Future[bytes | bytearray] = asyncio.get_running_loop().create_future()

    async def handler(stream: Stream) -> None:
        received.set_result(await stream.receive())

    async with (
        Libp2pTransport.start(b"a" * 32, LOOPBACK) as transport,
        TrioBridge.start("hostile", lambda: Host.start(b"h" * 32, LOOPBACK)) as hostile,
    ):
        transport.serve("/victim/1", handler, max_message_bytes=1 << 20)
        transport._bridge.post_task(decoded.take_turns)
        wire = start + b"".join(crumbs)
        where = (transport.peer, list(transport.addresses))
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            writing = group.create_task(hostile.call(write_frame, hostile.resource, *where, wire))
            assert await received == body
            writing.cancel()
    decoded.check_slices()


async def test_more_than_the_credit_is_a_protocol_error() -> None:
    body = bytes(100_000)
    record = framing.Outgoing([body]).record(1 << 20)[0]
    wire = record * (2 * framing.WINDOW_BYTES // len(record))
    is_broken, is_done = asyncio.Event(), asyncio.Event()
    received: list[bytes | bytearray] = []

    async def reads_too_late(stream: Stream) -> None:
        await is_broken.wait()
        try:
            while True:
                received.append(await stream.receive())
        except ProtocolError:
            is_done.set()

    async with (
        Libp2pTransport.start(b"a" * 32, LOOPBACK) as transport,
        TrioBridge.start("hostile", lambda: Host.start(b"h" * 32, LOOPBACK)) as hostile,
    ):
        transport.serve("/victim/1", reads_too_late, max_message_bytes=1 << 20)
        async with asyncio.timeout(20):  # the stream breaks although nobody reads it
            await hostile.call(
                write_raw, hostile.resource, transport.peer, list(transport.addresses), wire
            )
            is_broken.set()
            await is_done.wait()
    assert 8 << 20 < len(received) * len(body) <= framing.WINDOW_BYTES + len(body)


async def test_a_peer_has_a_bounded_number_of_streams() -> None:
    num_open = 0

    async def handler(stream: Stream) -> None:
        nonlocal num_open
        num_open += 1
        await asyncio.Event().wait()

    async def flood(host: Host, peer: str, addresses: list[str]) -> int:
        """Open as many streams as one connection can hold, and leave them open."""
        count = MAX_STREAMS_PER_PEER - 1
        return len([await host.open(peer, addresses, "/hold/1", 1.0) for _ in range(count)])

    async with (
        Libp2pTransport.start(b"a" * 32, LOOPBACK) as transport,
        TrioBridge.start("hostile", lambda: Host.start(b"h" * 32, LOOPBACK)) as hostile,
    ):
        transport.serve("/hold/1", handler, max_message_bytes=1)
        where = (transport.peer, list(transport.addresses))
        assert await hostile.call(flood, hostile.resource, *where) == MAX_STREAMS_PER_PEER - 1
        with pytest.raises(PeerLostError):
            await hostile.call(flood, hostile.resource, *where)
        assert num_open <= MAX_STREAMS_PER_PEER
