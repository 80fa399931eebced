"""The switch's links: broken ones are reported, old ones ended, and nobody waits for ever."""

import asyncio

import pytest
from switch_nodes import (
    HEAD,
    JOB,
    LARGE_BYTES,
    A,
    B,
    C,
    Node,
    frame,
    never_read,
    plan,
    settle,
    swarm,
    virtual,
)

from swarmnode.errors import RefusedError
from swarmnode.messages import (
    Frame,
)
from swarmnode.p2p import switch as switches
from swarmnode.p2p.links import LARGE_BYTES as LINK_BYTES
from swarmnode.p2p.memory import MemoryStream
from swarmnode.p2p.switch import ANNOUNCE_EVERY_S, MIN_BYTES_PER_S, MIN_TIMEOUT_S
from swarmnode.wire import TENSOR_PROTOCOL


def test_a_broken_link_is_reported_once_and_a_later_frame_opens_a_new_one() -> None:
    async def scenario() -> None:
        async with swarm() as s:
            a, b = s.node(A, plan()), s.node(B, plan())
            await a.switch.send(frame(0, 1, mb=1))
            await settle()
            s.network.kill(B)
            for number in (2, 3):
                await a.switch.send(frame(0, 1, mb=number))
                await settle()
            assert {peer for peer, _ in a.broken} == {B}
            assert len(a.broken) == 2  # the stream that broke, and the peer that is not there
            again = s.node(B, plan())
            await a.switch.send(frame(0, 1, mb=4))
            await settle()
            assert [m.microbatch for m, _ in b.worker if isinstance(m, Frame)] == [1]
            assert [m.microbatch for m, _ in again.worker if isinstance(m, Frame)] == [4]

    virtual(scenario())


def test_a_generation_does_not_use_the_streams_of_the_one_before() -> None:
    """A peer that was started again meanwhile is no broken link: nothing of it is sent before."""

    async def scenario() -> None:
        async with swarm() as s:
            a, _ = s.node(A, plan()), s.node(B, plan())
            await a.switch.send(frame(0, 1, mb=1))
            await settle()
            s.network.kill(B)
            again = s.node(B, plan(generation=2))
            a.join(plan(generation=2))
            await a.switch.send(frame(0, 1, mb=2, generation=2))
            await settle()
            assert not a.broken
            assert [m.microbatch for m, _ in again.worker if isinstance(m, Frame)] == [2]

    virtual(scenario())


def test_a_peer_that_serves_no_tensors_is_a_broken_link() -> None:
    async def scenario() -> None:
        async with swarm() as s:
            a = s.node(A, plan())
            s.network.transport(B)
            await a.switch.send(frame(0, 1))
            await settle()
            refused = RefusedError(B, f"does not serve {TENSOR_PROTOCOL}")
            assert a.broken == [(B, str(refused))]

    virtual(scenario())


def test_a_peer_that_does_not_read_is_a_broken_link_after_a_while() -> None:
    async def scenario() -> float:
        async with swarm() as s:
            a = s.node(A, plan())
            s.network.transport(B).serve(TENSOR_PROTOCOL, never_read, max_message_bytes=1 << 30)
            for number in range(4):
                await a.switch.send(frame(0, 1, mb=number), bytes(LARGE_BYTES))
            await a.is_broken.wait()
            assert a.broken == [(B, "takes nothing off the wire")]
            return asyncio.get_running_loop().time()

    assert virtual(scenario()) == pytest.approx(MIN_TIMEOUT_S + LARGE_BYTES / MIN_BYTES_PER_S)


def test_a_peer_that_leaves_the_plan_loses_its_lane() -> None:
    async def scenario() -> None:
        async with swarm() as s:
            a, b = s.node(A, plan()), s.node(B, plan())
            await a.switch.send(frame(0, 1))
            await settle()
            lane = next(t for t in asyncio.all_tasks() if t.get_name() == "tensors to b")
            a.join(plan("a", "c", generation=2))
            await settle()
            assert lane.done()
            assert (a.broken, b.broken) == ([], [])  # nobody is to blame
            c = s.node(C, plan("a", "c", generation=2))
            await a.switch.send(frame(0, 1, generation=2))
            await settle()
            assert [m.generation for m, _ in c.worker] == [2]
            assert not a.switch.names(B, JOB)

    virtual(scenario())


def test_a_job_is_forgotten_when_neither_worker_nor_head_is_left() -> None:
    async def scenario() -> None:
        async with swarm() as s:
            a, b = s.node(A, plan(), head=True), s.node(B, plan())
            await a.switch.send(frame(0, 1))
            await settle()
            a.switch.leave(JOB, worker=True)
            assert a.switch.names(B, JOB)
            a.switch.leave(JOB, head=True)
            a.switch.leave(JOB, head=True)
            await settle()
            assert not a.switch.names(B, JOB)
            assert a.switch.sent(JOB) == {}
            assert not [t for t in asyncio.all_tasks() if t.get_name() == "tensors to b"]
            await b.switch.send(frame(1, 0))
            await settle()
            assert (a.worker, a.dropped) == ([], {"refused_peer": 1})

    virtual(scenario())


def test_an_older_plan_does_not_replace_a_newer_one() -> None:
    async def scenario() -> None:
        async with swarm() as s:
            a, c = s.node(A, plan("a", "c", generation=2)), s.node(C, plan("a", "c", generation=2))
            a.join(plan())
            await a.switch.send(frame(0, 1, generation=2))
            await a.switch.send(frame(0, 1))
            await settle()
            assert [m.generation for m, _ in c.worker] == [2]
            assert a.dropped == {"stale_frame": 1}

    virtual(scenario())


def test_an_older_plan_does_not_end_the_lanes_of_a_newer_one() -> None:
    async def scenario() -> None:
        async with swarm() as s:
            newer = plan("a", "c", generation=2)
            a, c = s.node(A, newer), s.node(C, newer)
            await a.switch.send(frame(0, 1, generation=2))
            a.join(plan())
            await settle()
            assert [m.generation for m, _ in c.worker] == [2]

    virtual(scenario())


async def send_large(node: Node, num_frames: int) -> None:
    for number in range(num_frames):
        await node.switch.send(frame(0, 1, mb=number), bytes(LARGE_BYTES))


@pytest.mark.parametrize("how", ["broken", "left the plan"])
def test_a_sender_that_waits_for_room_goes_on_when_the_link_ends(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switches, "MAX_QUEUED_FRAMES", 2)

    async def scenario() -> None:
        async with swarm() as s:
            a = s.node(A, plan())
            s.network.transport(B).serve(TENSOR_PROTOCOL, never_read, max_message_bytes=1 << 30)
            async with asyncio.timeout(1000 * MIN_TIMEOUT_S), asyncio.TaskGroup() as group:
                sender = group.create_task(send_large(a, 6))
                await settle()
                assert not sender.done()
                if how == "left the plan":
                    a.join(plan("a", "c", generation=2))

    virtual(scenario())


def test_a_sender_goes_on_though_the_reset_of_a_broken_link_takes_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(switches, "MAX_QUEUED_FRAMES", 2)
    reset = MemoryStream.reset

    async def slow_reset(stream: MemoryStream) -> None:
        await asyncio.sleep(1.0)
        await reset(stream)

    async def scenario() -> None:
        async with swarm() as s:
            a = s.node(A, plan())
            s.network.transport(B).serve(TENSOR_PROTOCOL, never_read, max_message_bytes=1 << 30)
            monkeypatch.setattr(MemoryStream, "reset", slow_reset)
            async with asyncio.timeout(1000 * MIN_TIMEOUT_S):
                await send_large(a, 20)

    virtual(scenario())


def test_what_waits_for_its_turn_is_not_sent_in_a_later_generation() -> None:
    async def scenario() -> None:
        async with swarm() as s:
            a, b = s.node(A, plan()), s.node(B, plan(generation=2))
            await a.switch.send(frame(0, 1))
            a.join(plan(generation=2))
            await a.switch.send(frame(0, 1, generation=2))
            await settle()
            assert [m.generation for m, _ in b.worker] == [2]
            assert b.dropped == {}

    virtual(scenario())


# ---- how fast they are -------------------------------------------------------------------------

BYTES_PER_S = 10e6


@pytest.fixture
def slow_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent takes its time to arrive."""
    send = MemoryStream.send

    async def slow_send(stream: MemoryStream, *parts: bytes) -> None:
        await asyncio.sleep(sum(len(part) for part in parts) / BYTES_PER_S)
        await send(stream, *parts)

    monkeypatch.setattr(MemoryStream, "send", slow_send)


@pytest.mark.parametrize("gap_s", [0.0, 3.0])
def test_large_frames_are_timed_where_they_arrive(slow_link: None, gap_s: float) -> None:
    async def scenario() -> None:
        async with swarm() as s:
            a, b = s.node(A, plan()), s.node(B, plan())
            for number in range(4):
                await a.switch.send(frame(0, 1, mb=number), bytes(LARGE_BYTES))
                await asyncio.sleep(gap_s)
            await asyncio.sleep(10.0)
            assert [m.microbatch for m, _ in b.worker if isinstance(m, Frame)] == [0, 1, 2, 3]
            assert {peer for peer, _, _ in b.transfers} == {A}
            speeds = [num_bytes / seconds for _, num_bytes, seconds in b.transfers]
            assert speeds == [pytest.approx(BYTES_PER_S, rel=0.01)] * 4
            assert (a.transfers, b.dropped) == ([], {})

    virtual(scenario())


def test_small_frames_are_not_timed_and_large_ones_only_now_and_then(slow_link: None) -> None:
    async def scenario() -> None:
        async with swarm() as s:
            a, b = s.node(A, plan()), s.node(B, plan())
            for number in range(20):
                await a.switch.send(frame(0, 1, mb=number), bytes(LINK_BYTES - 1))
            await asyncio.sleep(10.0)
            assert b.transfers == []
            for number in range(40):  # about a second in all
                await a.switch.send(frame(0, 1, mb=number), bytes(LINK_BYTES))
            await asyncio.sleep(10.0)
            assert 1 <= len(b.transfers) <= 1 + 40 * LINK_BYTES / BYTES_PER_S / ANNOUNCE_EVERY_S
            assert len(b.worker) == 60

    virtual(scenario())


def test_partners_are_the_other_peers_of_every_plan() -> None:
    async def scenario() -> None:
        async with swarm() as s:
            a = s.node(A)
            assert a.switch.partners() == frozenset()
            a.join(plan())
            assert a.switch.partners() == {B, HEAD}
            a.switch.leave(JOB, worker=True)
            assert a.switch.partners() == frozenset()

    virtual(scenario())
