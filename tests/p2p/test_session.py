"""A conversation: messages both ways, a heartbeat, and silence or nonsense as its end."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import async_solipsism
import pytest

from swarmnode.domain import Generation, JobId, PeerId
from swarmnode.errors import FrameTooLargeError, PeerLostError, ProtocolError, SwarmError
from swarmnode.heartbeats import Ping
from swarmnode.messages import (
    Begin,
    Message,
    Release,
)
from swarmnode.p2p.framing import WINDOW_BYTES
from swarmnode.p2p.memory import MemoryStream, stream_pair
from swarmnode.p2p.session import (
    DEAD_AFTER_S,
    HEARTBEAT_S,
    SEND_TIMEOUT_S,
    Conversation,
    first_error,
)
from swarmnode.wire import pack, unpack

ResultT = TypeVar("ResultT")
JOB, OTHER_JOB = JobId("0123456789abcdef"), JobId("fedcba9876543210")
HOUR_S = 3600.0
LIMIT_BYTES = 1 << 30


def virtual(scenario: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Run on a clock that jumps over every wait."""
    with asyncio.Runner(loop_factory=async_solipsism.EventLoop) as runner:
        return runner.run(scenario)


def now_s() -> float:
    return asyncio.get_running_loop().time()


def begin(step: int) -> Begin:
    return Begin(JOB, Generation(1), step)


def pair() -> tuple[MemoryStream, MemoryStream]:
    return stream_pair(PeerId("here"), LIMIT_BYTES, PeerId("there"), LIMIT_BYTES)


class Heard:
    """A conversation's receiver: keeps what arrived."""

    def __init__(self) -> None:
        self.messages: list[tuple[Message, bytes]] = []

    async def __call__(self, message: Message, payload: memoryview) -> None:
        self.messages.append((message, bytes(payload)))


@asynccontextmanager
async def reading(stream: MemoryStream) -> AsyncIterator[list[Message]]:
    """Read everything that comes, for as long as the block lasts."""
    seen: list[Message] = []

    async def read() -> None:
        with contextlib.suppress(PeerLostError):
            while True:
                seen.append(unpack(await stream.receive())[0])

    async with asyncio.TaskGroup() as group:
        task = group.create_task(read())
        yield seen
        task.cancel()


def test_messages_arrive_in_order_both_ways_with_their_payloads() -> None:
    async def scenario() -> None:
        ours, theirs = pair()
        sent: list[int] = []
        heard_here, heard_there = Heard(), Heard()
        here = Conversation(ours, JOB, heard_here, sent.append)
        there = Conversation(theirs, JOB, heard_there)
        for step in range(50):
            here.post(begin(step), b"%d" % step)
            there.post(begin(100 + step))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(c.run()) for c in (here, there)]
            await asyncio.sleep(HEARTBEAT_S / 2)
            for task in tasks:
                task.cancel()
        assert heard_there.messages == [(begin(s), b"%d" % s) for s in range(50)]
        assert heard_here.messages == [(begin(100 + s), b"") for s in range(50)]
        assert sent == [len(pack(begin(s))) + len(b"%d" % s) for s in range(50)]

    virtual(scenario())


def test_a_silent_peer_is_lost_after_the_limit() -> None:
    async def scenario() -> float:
        ours, theirs = pair()
        async with reading(theirs):
            with pytest.raises(PeerLostError, match="silent for 5 s") as caught:
                await Conversation(ours, JOB, Heard()).run()
        assert caught.value.peer == "there"
        return now_s()

    assert virtual(scenario()) == pytest.approx(DEAD_AFTER_S)


def test_a_chatty_peer_is_kept_until_it_falls_silent() -> None:
    async def scenario() -> tuple[float, float]:
        ours, theirs = pair()

        async def chat() -> float:
            while now_s() < HOUR_S:
                await theirs.send(pack(Ping(JOB)))
                await asyncio.sleep(DEAD_AFTER_S * 0.98)
            await theirs.send(pack(Ping(JOB)))
            return now_s()

        async with reading(theirs), asyncio.TaskGroup() as group:
            chatting = group.create_task(chat())
            with pytest.raises(PeerLostError, match="silent"):
                await Conversation(ours, JOB, Heard()).run()
        return chatting.result(), now_s()

    last_word_s, lost_s = virtual(scenario())
    assert last_word_s >= HOUR_S
    assert lost_s == pytest.approx(last_word_s + DEAD_AFTER_S)


def test_two_idle_ends_keep_each_other_alive_and_hear_nothing_of_it() -> None:
    async def scenario() -> None:
        ours, theirs = pair()
        heard = Heard()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(Conversation(stream, JOB, heard).run())
                for stream in (ours, theirs)
            ]
            await asyncio.sleep(HOUR_S)
            assert [task.done() for task in tasks] == [False, False]
            for task in tasks:
                task.cancel()
        assert heard.messages == []

    virtual(scenario())


def test_an_idle_end_sends_one_heartbeat_per_interval() -> None:
    async def scenario() -> list[Message]:
        ours, theirs = pair()
        async with reading(theirs) as seen, asyncio.TaskGroup() as group:
            task = group.create_task(Conversation(ours, JOB, Heard()).run())
            for _ in range(60):
                await theirs.send(pack(Ping(JOB)))
                await asyncio.sleep(HEARTBEAT_S)
            task.cancel()
        return seen

    seen = virtual(scenario())
    assert set(seen) == {Ping(JOB)}
    assert 59 <= len(seen) <= 61


@pytest.mark.parametrize(
    "nonsense",
    [b"", b"\0\0\0\1\xc0", b"x" * 100, pack(Ping(OTHER_JOB)), pack(Release(OTHER_JOB, ""))],
    ids=["nothing", "nil", "text", "heartbeat of another job", "message of another job"],
)
def test_nonsense_ends_the_conversation_and_the_stream(nonsense: bytes) -> None:
    async def scenario() -> None:
        ours, theirs = pair()
        heard = Heard()
        await theirs.send(pack(begin(1)))
        await theirs.send(nonsense)
        await theirs.send(pack(begin(2)))
        with pytest.raises(ProtocolError):
            await Conversation(ours, JOB, heard).run()
        assert heard.messages == [(begin(1), b"")]
        with pytest.raises(PeerLostError):
            await theirs.send(b"x")
        assert now_s() == 0.0

    virtual(scenario())


def test_a_peer_that_closes_its_side_ends_the_conversation_in_peace() -> None:
    async def scenario() -> None:
        ours, theirs = pair()
        heard = Heard()
        await theirs.send(pack(begin(1)))
        await theirs.close_write()
        await Conversation(ours, JOB, heard).run()
        assert heard.messages == [(begin(1), b"")]
        assert now_s() == 0.0

    virtual(scenario())


def test_a_stream_that_breaks_is_a_lost_peer() -> None:
    async def scenario() -> float:
        ours, theirs = pair()
        async with asyncio.TaskGroup() as group:
            group.create_task(_reset_after(theirs, 2.5))
            with pytest.raises(PeerLostError, match="reset"):
                await Conversation(ours, JOB, Heard()).run()
        return now_s()

    assert virtual(scenario()) == 2.5


async def _reset_after(stream: MemoryStream, wait_s: float) -> None:
    await asyncio.sleep(wait_s)
    await stream.reset()


def test_a_full_outbox_is_a_lost_peer() -> None:
    async def scenario() -> None:
        ours, _ = pair()
        conversation = Conversation(ours, JOB, Heard(), max_queued=3)
        for step in range(3):
            conversation.post(begin(step))
        with pytest.raises(PeerLostError, match="outbox is full"):
            conversation.post(begin(3))

    virtual(scenario())


def test_a_peer_that_takes_nothing_off_the_wire_is_lost() -> None:
    async def scenario() -> float:
        ours, theirs = pair()
        conversation = Conversation(ours, JOB, Heard())
        for step in range(3):
            conversation.post(begin(step), bytes(WINDOW_BYTES // 2))

        async def chat() -> None:
            while True:
                await theirs.send(pack(Ping(JOB)))
                await asyncio.sleep(HEARTBEAT_S)

        async with asyncio.TaskGroup() as group:
            chatting = group.create_task(chat())
            with pytest.raises(PeerLostError, match="takes nothing off the wire"):
                await conversation.run()
            chatting.cancel()
        return now_s()

    assert virtual(scenario()) == pytest.approx(SEND_TIMEOUT_S)


def test_a_message_over_the_limit_of_the_stream_ends_the_conversation() -> None:
    async def scenario() -> None:
        ours, theirs = stream_pair(PeerId("here"), 1000, PeerId("there"), 1000)
        conversation = Conversation(ours, JOB, Heard())
        conversation.post(begin(1), bytes(1000))
        async with reading(theirs) as seen:
            with pytest.raises(FrameTooLargeError):
                await conversation.run()
        assert seen == []

    virtual(scenario())


@pytest.mark.parametrize("error", [SwarmError("ours"), ZeroDivisionError("a bug")], ids=repr)
def test_what_the_receiver_raises_ends_the_conversation(error: Exception) -> None:
    async def fail(_message: Message, _payload: memoryview) -> None:
        raise error

    async def scenario() -> None:
        ours, theirs = pair()
        await theirs.send(pack(begin(1)))
        with pytest.raises(type(error)) as caught:
            await Conversation(ours, JOB, fail).run()
        assert caught.value is error
        with pytest.raises(PeerLostError):
            await theirs.receive()

    virtual(scenario())


def test_a_receiver_may_take_longer_than_the_limit_of_silence() -> None:
    async def slow(_message: Message, _payload: memoryview) -> None:
        await asyncio.sleep(DEAD_AFTER_S * 3)
        done.append(now_s())

    done: list[float] = []

    async def scenario() -> None:
        ours, theirs = pair()
        there = Conversation(theirs, JOB, Heard())
        there.post(begin(1))
        there.post(begin(2))
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(talk.run()) for talk in (there, Conversation(ours, JOB, slow))
            ]
            await asyncio.sleep(DEAD_AFTER_S * 7)
            assert [task.done() for task in tasks] == [False, False]
            for task in tasks:
                task.cancel()

    virtual(scenario())
    assert done == [DEAD_AFTER_S * 3, DEAD_AFTER_S * 6]


def test_cancelling_resets_the_stream_and_leaves_no_task() -> None:
    async def scenario() -> None:
        ours, theirs = pair()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(Conversation(ours, JOB, Heard()).run())
            await asyncio.sleep(HEARTBEAT_S / 2)
            task.cancel()
        assert task.cancelled()
        with pytest.raises(PeerLostError):
            await theirs.receive()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    virtual(scenario())


def test_the_first_error_is_one_of_ours_if_there_is_one() -> None:
    bug, ours, later = ZeroDivisionError(), SwarmError("first"), SwarmError("later")
    nested = ExceptionGroup("", [ExceptionGroup("", [bug, ours]), bug])
    assert first_error(nested) is ours
    assert first_error(ExceptionGroup("", [later, ExceptionGroup("", [ours])])) is later
    assert first_error(ExceptionGroup("", [ExceptionGroup("", [bug])])) is bug
