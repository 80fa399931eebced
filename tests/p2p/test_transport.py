"""What every transport promises: one suite, run in memory and over libp2p."""

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import async_solipsism
import pytest
from transport_worlds import (
    MAX_MESSAGE_BYTES,
    MEBIBYTE,
    World,
    echo,
    libp2p_world,
    memory_world,
    send_until_blocked,
    wait_blocked,
)

from swarmnode.domain import PeerId
from swarmnode.errors import FrameTooLargeError, PeerLostError, RefusedError
from swarmnode.p2p import framing
from swarmnode.p2p.ports import EndOfStream, Stream

EnterWorld = Callable[[], AbstractAsyncContextManager[World]]


async def test_messages_arrive_whole_and_in_order(enter_world: EnterWorld) -> None:
    rng = random.Random(0)
    bodies = [rng.randbytes(rng.choice([0, 1, 100, 5000, 300_000])) for _ in range(300)]
    async with enter_world() as world:
        ours, theirs = await world.pair()

        async def send(stream: Stream) -> None:
            for body in bodies:
                await stream.send(body[:7], memoryview(body)[7:])

        async with asyncio.TaskGroup() as group:
            group.create_task(send(ours))
            group.create_task(send(theirs))
            received = [
                group.create_task(_receive(stream, len(bodies))) for stream in (ours, theirs)
            ]
    assert [task.result() == bodies for task in received] == [True, True]


async def _receive(stream: Stream, num_messages: int) -> list[bytes | bytearray]:
    return [await stream.receive() for _ in range(num_messages)]


async def test_each_end_knows_the_other(enter_world: EnterWorld) -> None:
    async with enter_world() as world:
        ours, theirs = await world.pair()
        assert (ours.peer, theirs.peer) == (world.there.peer, world.here.peer)
        assert world.here.peer != world.there.peer
        assert all(a.endswith(f"/p2p/{world.here.peer}") for a in world.here.addresses)


async def test_a_sender_stops_when_nobody_reads(enter_world: EnterWorld) -> None:
    sent: list[bytes] = []
    async with enter_world() as world:
        ours, theirs = await world.pair()
        async with asyncio.TaskGroup() as group:
            sender = group.create_task(send_until_blocked(ours, sent))
            await wait_blocked(sent)
            num_blocked = len(sent)
            assert 8 <= num_blocked <= framing.WINDOW_BYTES // MEBIBYTE
            for index in range(num_blocked + 20):  # reading lets it go on
                assert (await theirs.receive())[:4] == index.to_bytes(4, "big")
            sender.cancel()


async def test_what_has_left_of_a_message_that_is_under_way_is_known() -> None:
    async with libp2p_world() as world:
        ours, theirs = await world.pair()
        message = bytes(framing.WINDOW_BYTES + 8 * MEBIBYTE)
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            sender = group.create_task(ours.send(message))
            await asyncio.sleep(0)
            while ours.sent_bytes <= MEBIBYTE:  # told by another thread
                await asyncio.wait([sender], timeout=0.01)
            assert not sender.done()
            assert ours.sent_bytes < len(message)
            assert len(await theirs.receive()) == len(message)
        assert ours.sent_bytes >= len(message)


async def pause_and_go_on(world: World, pause_s: float) -> None:
    sent: list[bytes] = []
    ours, theirs = await world.pair()
    async with asyncio.TaskGroup() as group:
        sender = group.create_task(send_until_blocked(ours, sent))
        assert (await theirs.receive())[:4] == bytes(4)
        await asyncio.sleep(pause_s)
        for index in range(1, 60):
            assert (await theirs.receive())[:4] == index.to_bytes(4, "big")
        sender.cancel()


async def test_a_reader_may_pause_for_ten_seconds_libp2p() -> None:
    """The muxer gives up on a stream unread for 5 s; real time, since that is what is tested."""
    async with libp2p_world() as world:
        await pause_and_go_on(world, 10.0)


def test_a_reader_may_pause_for_an_hour_memory() -> None:
    """On a virtual clock, which also shows that the memory network needs no real one."""

    async def scenario() -> float:
        async with memory_world() as world:
            await pause_and_go_on(world, 3600.0)
        return asyncio.get_running_loop().time()

    started_s = time.monotonic()
    with asyncio.Runner(loop_factory=async_solipsism.EventLoop) as runner:
        assert runner.run(scenario()) >= 3600.0
    assert time.monotonic() - started_s < 30.0


async def test_half_close(enter_world: EnterWorld) -> None:
    async with enter_world() as world:
        ours, theirs = await world.pair()
        await ours.send(b"last")
        await ours.close_write()
        assert await theirs.receive() == b"last"
        for _ in range(2):
            with pytest.raises(EndOfStream):
                await theirs.receive()
        await theirs.send(b"answer", b"!")
        assert await ours.receive() == b"answer!"
        await theirs.close_write()
        with pytest.raises(EndOfStream):
            await ours.receive()


async def test_what_a_handler_sent_arrives_though_it_has_returned(enter_world: EnterWorld) -> None:
    body = secrets.token_bytes(8 * MEBIBYTE)

    async def answer_and_go(stream: Stream) -> None:
        await stream.receive()
        await stream.send(body)

    async with enter_world() as world:
        world.there.serve("/once/1", answer_and_go, max_message_bytes=MAX_MESSAGE_BYTES)
        for _ in range(5):
            stream = await world.open("/once/1")
            await stream.send(b"?")
            assert await stream.receive() == body
            with pytest.raises(EndOfStream):
                await stream.receive()
            with pytest.raises(PeerLostError):
                await send_until_blocked(stream, [])


async def test_large_messages_both_ways_at_once(enter_world: EnterWorld) -> None:
    bodies = [secrets.token_bytes(64 * MEBIBYTE) for _ in range(2)]
    async with enter_world() as world:
        ours, theirs = await world.pair()
        async with asyncio.TaskGroup() as group:
            group.create_task(ours.send(bodies[0]))
            group.create_task(theirs.send(bodies[1]))
            there = group.create_task(theirs.receive())
            here = group.create_task(ours.receive())
    assert [there.result() == bodies[0], here.result() == bodies[1]] == [True, True]


async def test_cancelling_receive_loses_nothing(enter_world: EnterWorld) -> None:
    bodies = [index.to_bytes(4, "big") * 20_000 for index in range(100)]
    rng = random.Random(1)
    received: list[bytes | bytearray] = []
    num_cancelled = 0
    async with enter_world() as world:
        ours, theirs = await world.pair()

        async def send() -> None:
            for body in bodies:
                await ours.send(body)
                await asyncio.sleep(rng.random() * 0.002)

        async with asyncio.TaskGroup() as group:
            group.create_task(send())
            while len(received) < len(bodies):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(rng.random() * 0.002):
                        received.append(await theirs.receive())
                        continue
                num_cancelled += 1
    assert received == bodies
    assert num_cancelled > 10


async def test_a_send_cancelled_before_it_began_leaves_no_trace(enter_world: EnterWorld) -> None:
    sent: list[bytes] = []
    async with enter_world() as world:
        ours, theirs = await world.pair()
        async with asyncio.TaskGroup() as group:
            first = group.create_task(send_until_blocked(ours, sent))
            await wait_blocked(sent)
            second = group.create_task(ours.send(b"withdrawn"))
            await asyncio.sleep(0)
            second.cancel()
            await asyncio.wait([second])
            assert second.cancelled()
            for index in range(100):
                message = await theirs.receive()
                assert message == index.to_bytes(4, "big") * (MEBIBYTE // 4)
            first.cancel()


async def test_a_send_cancelled_half_way_never_shows_a_torn_message(
    enter_world: EnterWorld,
) -> None:
    sent: list[bytes] = []
    async with enter_world() as world:
        ours, theirs = await world.pair()
        async with asyncio.TaskGroup() as group:
            sender = group.create_task(send_until_blocked(ours, sent))
            await wait_blocked(sent)
            sender.cancel()
        with contextlib.suppress(PeerLostError):  # one that had begun takes the stream with it
            await ours.send(b"after")
        received = []
        with contextlib.suppress(PeerLostError):
            while not received or received[-1] != b"after":
                received.append(await theirs.receive())
        assert received[: len(sent)] == sent
        assert received[len(sent) :] in ([], [b"after"])


@pytest.mark.parametrize("protocol", ["/echo/1", "/hold/1"])
async def test_the_death_of_a_peer_is_noticed_at_once(
    enter_world: EnterWorld, protocol: str
) -> None:
    sent: list[bytes] = []
    async with enter_world() as world, world.victim() as victim:
        stream = await world.here.open(
            victim.peer, victim.addresses, protocol, max_message_bytes=MAX_MESSAGE_BYTES
        )
        other = await world.here.open(
            victim.peer, victim.addresses, "/echo/1", max_message_bytes=MAX_MESSAGE_BYTES
        )
        await other.send(b"alive?")
        assert await other.receive() == b"alive?"
        async with asyncio.TaskGroup() as group:
            sender = group.create_task(_lost_after(send_until_blocked(stream, sent)))
            receiver = group.create_task(_lost_after(other.receive()))
            await wait_blocked(sent)
            killed_s = time.monotonic()
            victim.kill()
        assert max(sender.result(), receiver.result()) - killed_s < 1.5
        with pytest.raises(PeerLostError):
            await world.here.open(
                victim.peer, victim.addresses, protocol, max_message_bytes=MAX_MESSAGE_BYTES
            )


async def _lost_after(action: object) -> float:
    with pytest.raises(PeerLostError):
        await action  # type: ignore[misc]
    return time.monotonic()


async def test_an_oversized_message_breaks_the_stream_on_both_sides(
    enter_world: EnterWorld,
) -> None:
    errors: asyncio.Queue[Exception] = asyncio.Queue()

    async def handler(stream: Stream) -> None:
        assert await stream.receive() == b"small"
        try:
            await stream.receive()
        except FrameTooLargeError as error:
            errors.put_nowait(error)
            raise

    async with enter_world() as world:
        world.there.serve("/small/1", handler, max_message_bytes=1000)
        stream = await world.open("/small/1")
        await stream.send(b"small")
        with contextlib.suppress(PeerLostError):
            await stream.send(bytes(MEBIBYTE))
        error = await errors.get()
        assert isinstance(error, FrameTooLargeError)
        assert (error.num_bytes, error.max_bytes) == (MEBIBYTE, 1000)
        with pytest.raises(PeerLostError):
            await stream.receive()


async def test_an_oversized_message_is_not_even_sent(enter_world: EnterWorld) -> None:
    async with enter_world() as world:
        world.there.serve("/echo/1", echo, max_message_bytes=1000)
        stream = await world.open("/echo/1", max_message_bytes=1000)
        with pytest.raises(FrameTooLargeError):
            await stream.send(bytes(999), b"xx")
        await stream.send(bytes(1000))
        assert await stream.receive() == bytes(1000)


async def test_an_unserved_protocol_is_refused(enter_world: EnterWorld) -> None:
    async with enter_world() as world:
        with pytest.raises(RefusedError):
            await world.open("/nobody/1")
        world.there.serve("/echo/1", echo, max_message_bytes=1000)  # the connection is still good
        stream = await world.open("/echo/1")
        await stream.send(b"x")
        assert await stream.receive() == b"x"


async def test_open_to_self(enter_world: EnterWorld) -> None:
    async with enter_world() as world:
        with pytest.raises(RefusedError):
            await world.here.open(world.here.peer, (), "/echo/1", max_message_bytes=1000)
        world.here.serve("/echo/1", echo, max_message_bytes=1000)
        stream = await world.here.open(world.here.peer, (), "/echo/1", max_message_bytes=1000)
        assert stream.peer == world.here.peer
        await stream.send(b"me")
        assert await stream.receive() == b"me"


async def test_a_failing_handler_resets_only_its_stream(
    enter_world: EnterWorld, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(stream: Stream) -> None:
        await stream.receive()
        raise ZeroDivisionError

    async with enter_world() as world:
        ours, theirs = await world.pair()
        world.there.serve("/fail/1", fail, max_message_bytes=1000)
        stream = await world.open("/fail/1")
        with caplog.at_level(logging.ERROR, logger="swarmnode"):
            await stream.send(b"x")
            with pytest.raises(PeerLostError):
                await stream.receive()
        assert "ZeroDivisionError" in caplog.text
        await ours.send(b"still here")
        assert await theirs.receive() == b"still here"


async def test_reset_is_seen_by_the_peer_and_may_be_repeated(enter_world: EnterWorld) -> None:
    async with enter_world() as world:
        ours, theirs = await world.pair()
        async with asyncio.TaskGroup() as group:
            group.create_task(_lost_after(theirs.receive()))
            await ours.reset()
            await ours.reset()
        for lost in (ours.receive, ours.send, theirs.send):
            with pytest.raises(PeerLostError):
                await lost()


async def test_disconnect_breaks_the_streams_of_that_peer(enter_world: EnterWorld) -> None:
    async with enter_world() as world:
        ours, theirs = await world.pair()
        async with asyncio.TaskGroup() as group:
            group.create_task(_lost_after(ours.receive()))
            group.create_task(_lost_after(theirs.receive()))
            await world.here.disconnect(world.there.peer)
        again, _ = await world.pair()  # it may come back
        await again.send(b"x")


async def test_an_unknown_peer_is_unreachable(enter_world: EnterWorld) -> None:
    stranger = PeerId("12D3KooWLbVXKXTSzkRsQ9Bu1LLbn4iWQ7RY4XoyEzf2aXgzmzAo")
    async with enter_world() as world:
        for addresses in [(), (f"/ip4/127.0.0.1/tcp/1/p2p/{stranger}",), ("nonsense",)]:
            with pytest.raises(PeerLostError):
                await world.here.open(stranger, addresses, "/x/1", max_message_bytes=1)
