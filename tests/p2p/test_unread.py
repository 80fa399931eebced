"""What one peer's streams may leave unread here, all together."""

import asyncio
import threading
from contextlib import suppress
from typing import Any

import pytest
from libp2p.exceptions import BaseLibp2pError
from transport_worlds import LOOPBACK, World, hold, libp2p_world, send_until_blocked, wait_blocked

from swarmnode.p2p import framing, inbound
from swarmnode.p2p.channel import Inbox
from swarmnode.p2p.framing import Kind
from swarmnode.p2p.host import MAX_STREAMS_PER_PEER, Host
from swarmnode.p2p.ports import EndOfStream, Stream
from swarmnode.p2p.streams import Libp2pTransport
from swarmnode.p2p.trio_bridge import TrioBridge

NARROW, WIDE = framing.INITIAL_CREDIT_BYTES, framing.WINDOW_BYTES


def inboxes(num_places: int, count: int) -> list[Inbox]:
    """Those of streams of one connection."""
    places = threading.BoundedSemaphore(num_places)
    return [Inbox(lambda: None, places) for _ in range(count)]


def fill(inbox: Inbox) -> int:
    """Use all the credit that an inbox gives while nobody reads; how much that was."""
    total_bytes = NARROW
    body = bytearray(total_bytes - framing.MESSAGE_OVERHEAD_BYTES)
    while credit_bytes := inbox.put([body], total_bytes):
        total_bytes += credit_bytes
        body = bytearray()  # what of it has come does not matter here
    return total_bytes


def test_what_all_streams_of_a_connection_may_leave_unread_is_bounded() -> None:
    streams = inboxes(inbound.MAX_WIDE_STREAMS, MAX_STREAMS_PER_PEER)
    assert sum(map(fill, streams)) == 16 * WIDE + 240 * NARROW


def test_a_place_is_free_once_nothing_waits_and_nothing_comes() -> None:
    over, dropped, last = inboxes(1, 3)
    assert fill(over) == WIDE
    assert fill(dropped) == NARROW
    over.end(EndOfStream())
    assert dropped.put([], NARROW) == 0  # what has come to the first one still waits
    for _ in range(2):
        over.take()
    assert dropped.put([], NARROW) == WIDE - NARROW
    dropped.drop()
    assert fill(last) == NARROW  # what has begun to come to the second one still does
    dropped.end(EndOfStream())
    assert last.put([], NARROW) == WIDE - NARROW


def test_a_stream_that_is_read_has_the_whole_window_as_soon_as_there_is_a_place() -> None:
    first, second = inboxes(1, 2)
    used = framing.INITIAL_CREDIT_BYTES // 2
    for inbox in (first, second):
        assert inbox.take() == (None, 0)
    assert first.put([], used) == used + WIDE - NARROW
    assert second.put([], used) == used
    first.end(EndOfStream())
    assert second.put([], used + 1) == WIDE - NARROW + 1


def test_a_stream_on_which_little_comes_takes_no_place() -> None:
    """Many are only read in case that something comes, or carry large messages one way only."""
    sending, asking, receiving = inboxes(1, 3)
    assert sending.put([], 0) == 0  # only the credit that its peer gives has come
    for number in range(1, 100):
        assert asking.put([bytearray(b"a request")], 100 * number) == 0
        asking.take()
    assert fill(receiving) == WIDE


async def open_held(world: World, count: int) -> list[Stream]:
    """Open streams that nobody reads."""
    world.there.serve("/hold/1", hold, max_message_bytes=1 << 20)
    return [await world.open("/hold/1") for _ in range(count)]


async def test_a_peer_cannot_fill_the_window_of_every_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inbound, "MAX_WIDE_STREAMS", 2)
    sent: list[list[bytes]] = [[] for _ in range(5)]
    async with libp2p_world() as world:
        streams = await open_held(world, len(sent))
        async with asyncio.TaskGroup() as group:
            senders = [
                group.create_task(send_until_blocked(stream, log))
                for stream, log in zip(streams, sent, strict=True)
            ]
            for log in sent:
                await wait_blocked(log)
            for sender in senders:
                sender.cancel()
    num_bytes = sorted(stream.sent_bytes for stream in streams)
    assert max(num_bytes[:3]) < NARROW + (1 << 10)
    assert min(num_bytes[3:]) > WIDE // 2
    assert max(num_bytes) < WIDE + (1 << 10)


async def write(host: Host, peer: str, addresses: list[str], wire: bytes) -> None:
    """Write `wire` and read until the far end closes."""
    stream: Any = await host.open(peer, addresses, "/victim/1", 5.0)
    await stream.write(wire)
    with suppress(BaseLibp2pError):
        while True:
            await stream.read(1 << 16)


async def test_of_a_stream_whose_handler_has_returned_nothing_is_kept() -> None:
    message = framing.Outgoing([bytes(100_000)]).record(1 << 20)[0]
    wire = message * 20 + framing.encode_control(Kind.BYE)
    served: asyncio.Queue[Stream] = asyncio.Queue()

    async def reads_one(stream: Stream) -> None:
        await stream.receive()
        served.put_nowait(stream)

    async with (
        Libp2pTransport.start(b"a" * 32, LOOPBACK) as transport,
        TrioBridge.start("hostile", lambda: Host.start(b"h" * 32, LOOPBACK)) as hostile,
    ):
        transport.serve("/victim/1", reads_one, max_message_bytes=1 << 20)
        where = (transport.peer, list(transport.addresses))
        async with asyncio.timeout(10):
            await hostile.call(write, hostile.resource, *where, wire)
            stream = await served.get()
            with pytest.raises(EndOfStream):
                await stream.receive()
