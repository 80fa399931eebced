"""What only the libp2p transport can be asked: addresses, ports, who answers, how it stops."""

import asyncio
import socket
import threading
import time
from typing import Any

import pytest
import trio
from libp2p.stream_muxer.yamux.yamux import HEADER_SIZE, MAX_MESSAGE_SIZE
from transport_worlds import LOOPBACK, echo, libp2p_world

from swarmnode.domain import PeerId
from swarmnode.errors import PeerLostError
from swarmnode.p2p.framing import LEAST_CREDIT_BYTES
from swarmnode.p2p.ports import Stream
from swarmnode.p2p.streams import Libp2pStream, Libp2pTransport


async def test_another_peer_at_the_address_is_not_the_peer() -> None:
    stranger = PeerId("12D3KooWLbVXKXTSzkRsQ9Bu1LLbn4iWQ7RY4XoyEzf2aXgzmzAo")
    async with libp2p_world() as world:
        bare = [address.rpartition("/p2p/")[0] for address in world.there.addresses]
        with pytest.raises(PeerLostError, match="does not correspond"):
            await world.here.open(stranger, bare, "/pair/1", max_message_bytes=1)
        ours, _ = await world.pair()  # the right peer is still welcome
        assert ours.peer == world.there.peer


async def test_a_silent_address_is_lost_in_time_and_a_good_one_wins() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent_address = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}"
        async with (
            libp2p_world() as world,
            Libp2pTransport.start(b"c" * 32, LOOPBACK, open_timeout_s=0.5) as impatient,
        ):
            started_s = time.monotonic()
            with pytest.raises(PeerLostError, match="within"):
                await impatient.open(
                    world.there.peer, [silent_address], "/pair/1", max_message_bytes=1
                )
            assert 0.4 < time.monotonic() - started_s < 2.0
            world.there.serve("/echo/1", echo, max_message_bytes=10)
            addresses = [silent_address, *world.there.addresses]
            stream = await world.here.open(
                world.there.peer, addresses, "/echo/1", max_message_bytes=10
            )
            await stream.send(b"x")
            assert await stream.receive() == b"x"


async def test_who_waits_in_vain_breaks_no_other_connection_with_the_peer() -> None:
    """A peer that was stopped comes back while we still wait at an address of its earlier life."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent_address = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}"
        async with (
            Libp2pTransport.start(b"a" * 32, LOOPBACK, open_timeout_s=0.5) as here,
            Libp2pTransport.start(b"b" * 32, LOOPBACK) as there,
        ):
            here.serve("/echo/1", echo, max_message_bytes=10)
            vain = asyncio.create_task(
                here.open(there.peer, [silent_address], "/pair/1", max_message_bytes=1)
            )
            accepted, _ = await asyncio.to_thread(silent.accept)
            with accepted:
                stream = await there.open(
                    here.peer, here.addresses, "/echo/1", max_message_bytes=10
                )
                with pytest.raises(PeerLostError, match="within"):
                    await vain
            async with asyncio.timeout(2.0):
                await stream.send(b"x")
                assert await stream.receive() == b"x"


async def test_announces_what_it_is_told() -> None:
    async with Libp2pTransport.start(b"a" * 32, LOOPBACK, ["/ip4/9.9.9.9/tcp/4001"]) as transport:
        assert transport.addresses == (f"/ip4/9.9.9.9/tcp/4001/p2p/{transport.peer}",)


async def test_a_wildcard_becomes_addresses_that_can_be_dialled() -> None:
    async with (
        Libp2pTransport.start(b"a" * 32, LOOPBACK) as here,
        Libp2pTransport.start(b"b" * 32, ["/ip4/0.0.0.0/tcp/0"]) as there,
    ):
        assert there.addresses
        assert not any("0.0.0.0" in address for address in there.addresses)
        there.serve("/echo/1", echo, max_message_bytes=10)
        stream = await here.open(there.peer, there.addresses, "/echo/1", max_message_bytes=10)
        await stream.send(b"x")
        assert await stream.receive() == b"x"


async def test_a_taken_port_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = [f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"]
        with pytest.raises(OSError, match="cannot listen"):
            async with Libp2pTransport.start(b"a" * 32, listen):
                pytest.fail("must not start")


async def test_stopping_is_quick_and_breaks_its_streams() -> None:
    async with Libp2pTransport.start(b"a" * 32, LOOPBACK) as here:
        async with Libp2pTransport.start(b"b" * 32, LOOPBACK) as there:
            there.serve("/echo/1", echo, max_message_bytes=10)
            far = await here.open(there.peer, there.addresses, "/echo/1", max_message_bytes=10)
            started_s = time.monotonic()
        assert time.monotonic() - started_s < 2.0
        async with asyncio.timeout(2.0):
            with pytest.raises(PeerLostError):
                await far.receive()
    with pytest.raises(PeerLostError):
        await far.send(b"x")


async def test_a_stream_that_is_open_when_nobody_wants_it_any_more_is_reset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_open = threading.Event()
    served: asyncio.Queue[Stream] = asyncio.Queue()

    async def handler(stream: Stream) -> None:
        served.put_nowait(stream)
        await asyncio.Event().wait()

    async with libp2p_world() as world:
        assert isinstance(world.here, Libp2pTransport)
        host = world.here._bridge.resource
        open_stream = host.open

        async def observed(*where: Any) -> Any:
            stream = await open_stream(*where)
            is_open.set()
            return stream

        monkeypatch.setattr(host, "open", observed)
        world.there.serve("/victim/1", handler, max_message_bytes=1)
        opening = asyncio.create_task(world.open("/victim/1"))
        await asyncio.sleep(0)
        assert is_open.wait(5)  # asyncio stands still, so it cannot have heard of it
        opening.cancel()
        async with asyncio.timeout(5):
            theirs = await served.get()
            with pytest.raises(PeerLostError):
                await theirs.receive()
        assert opening.cancelled()


async def test_a_send_that_is_cancelled_inside_its_last_record_resets_the_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A record is several frames of the muxer, and each may have to wait for the others' frames.

    Here four bytes are left for the second frame: any control record would make them up.
    """
    body = bytes(MAX_MESSAGE_SIZE - HEADER_SIZE - 4)
    async with libp2p_world() as world:
        ours, theirs = await world.pair()
        await ours.send(b"first")
        assert await theirs.receive() == b"first"
        assert isinstance(ours, Libp2pStream)
        channel, bridge = ours._channel, ours._bridge
        write_frame = channel._muxed.conn._write_frame
        lengths: list[int] = []

        async def keep_the_second_waiting(frame: bytes) -> None:
            if len(frame) > HEADER_SIZE:
                lengths.append(len(frame))
            if len(frame) == HEADER_SIZE or len(lengths) != 2:
                while len(lengths) >= 2 and channel._write_lock.locked():  # the reset comes late
                    await trio.lowlevel.checkpoint()
                await write_frame(frame)
                return
            bridge.post_task(channel.grant, LEAST_CREDIT_BYTES)
            while not channel._write_lock.statistics().tasks_waiting:
                await trio.lowlevel.checkpoint()
            bridge.tell(sending.cancel)
            await trio.sleep_forever()

        monkeypatch.setattr(channel._muxed.conn, "_write_frame", keep_the_second_waiting)
        sending = asyncio.create_task(ours.send(body))
        async with asyncio.timeout(10):
            await asyncio.wait([sending])
            with pytest.raises(PeerLostError):
                await theirs.receive()
            with pytest.raises(PeerLostError):
                await ours.send(b"after")
        assert sending.cancelled()
        assert lengths == [MAX_MESSAGE_SIZE, HEADER_SIZE + 4]  # and nothing after that
