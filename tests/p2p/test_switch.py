"""The switch: frames reach the slot they name; what has no business here is dropped and counted."""

import asyncio
from dataclasses import replace

import pytest
from switch_nodes import (
    CLOSE,
    FAILED,
    HEAD,
    JOB,
    LARGE_BYTES,
    STRANGER,
    TOKEN,
    A,
    B,
    C,
    frame,
    never_read,
    piece,
    plan,
    settle,
    swarm,
    virtual,
)

from swarmnode.domain import Generation, JobId, Plan
from swarmnode.errors import PeerLostError, ProtocolError
from swarmnode.heartbeats import Ping
from swarmnode.messages import (
    Frame,
    Message,
)
from swarmnode.p2p.ports import EndOfStream, Stream
from swarmnode.p2p.switch import TensorMessage
from swarmnode.session_messages import (
    SessionClose,
    SessionFrame,
)
from swarmnode.wire import TENSOR_PROTOCOL, pack, unpack

# ---- delivery ----------------------------------------------------------------------------------


def test_messages_reach_the_host_of_their_slot_in_order_and_are_counted() -> None:
    async def scenario() -> None:
        async with swarm() as s:
            a, b = s.node(A, plan()), s.node(B, plan())
            sent: list[tuple[TensorMessage, bytes]] = [
                (frame(0, 1, mb=number), b"%d" % number) for number in range(20)
            ]
            sent += [(piece(1), b"hidden"), (CLOSE, b"")]
            for message, payload in sent:
                await a.switch.send(message, payload)
            await settle()
            assert b.worker == sent
            sizes = [len(pack(message)) + len(payload) for message, payload in sent]
            bytes_by_kind = {"activation": sum(sizes[:20]), "session": sum(sizes[20:])}
            assert a.switch.sent(JOB) == dict(a.sent) == bytes_by_kind
            assert b.switch.sent(JOB) == {}
            assert (a.dropped, b.dropped) == ({}, {})

    virtual(scenario())


def test_tokens_and_failures_go_to_the_coordinators_head() -> None:
    async def scenario() -> None:
        async with swarm() as s:
            head = s.node(HEAD, plan(), worker=False, head=True)
            a, b = s.node(A, plan()), s.node(B, plan())
            await b.switch.send(TOKEN)
            await settle()
            await a.switch.send(FAILED)
            await settle()
            assert head.head == [(TOKEN, b""), (FAILED, b"")]
            assert (head.worker, a.worker, b.worker) == ([], [], [])

    virtual(scenario())


def test_local_messages_never_touch_the_network() -> None:
    async def scenario() -> None:
        async with swarm() as s:
            alone = s.node(A)  # joins below: it hosts both stages and is its own head
            everything = Plan(Generation(1), ((0, 1), (1, 2)), ((A,), (A,)), A)
            alone.join(everything, head=True)
            s.network.kill(A)  # the network is gone, and nobody notices
            for message in (frame(0, 1), piece(1), CLOSE, TOKEN, FAILED):
                await alone.switch.send(message, b"x")
            assert [type(m) for m, _ in alone.worker] == [Frame, SessionFrame, SessionClose]
            assert alone.head == [(TOKEN, b"x"), (FAILED, b"x")]
            assert (alone.sent, alone.broken) == ({}, [])

    virtual(scenario())


def test_two_lanes_do_not_wait_for_each_other() -> None:
    async def scenario() -> None:
        async with swarm() as s:
            wide = plan("aa", "bc")
            a, c = s.node(A, wide), s.node(C, wide)
            s.network.transport(B).serve(TENSOR_PROTOCOL, never_read, max_message_bytes=1 << 30)
            for number in range(8):
                await a.switch.send(frame(0, 1, slot=0, mb=number), bytes(LARGE_BYTES))
                await a.switch.send(frame(0, 1, slot=1, mb=number))
            await settle()
            assert [m.microbatch for m, _ in c.worker if isinstance(m, Frame)] == [*range(8)]

    virtual(scenario())


def test_a_gradient_that_is_stuck_holds_up_no_hidden_state() -> None:
    async def scenario() -> None:
        arrived: list[str] = []

        async def take(stream: Stream) -> None:
            while True:
                message, _ = unpack(await stream.receive())
                if isinstance(message, Frame):
                    arrived.append(message.kind)
                if arrived == ["gradient"]:
                    await asyncio.Event().wait()

        async with swarm() as s:
            a = s.node(A, plan())
            s.network.transport(B).serve(TENSOR_PROTOCOL, take, max_message_bytes=1 << 30)
            gradient = replace(frame(0, 1), kind="gradient")
            for _ in range(4):
                await a.switch.send(gradient, bytes(LARGE_BYTES))
            await a.switch.send(replace(frame(0, 1), kind="activation_gradient"), b"x")
            await a.switch.send(frame(0, 1), b"x")
            await settle()
            assert sorted(arrived) == ["activation", "activation_gradient", "gradient"]

    virtual(scenario())


# ---- what is dropped ---------------------------------------------------------------------------


def test_a_message_of_another_generation_is_dropped_at_either_end() -> None:
    async def scenario() -> None:
        async with swarm() as s:
            a, b = s.node(A, plan()), s.node(B, plan(generation=3))
            await a.switch.send(frame(0, 1))  # older than what b knows
            await settle()
            assert (b.worker, b.dropped) == ([], {"stale_frame": 1})
            for generation in (0, 2):
                await a.switch.send(frame(0, 1, generation=generation))
            await settle()
            assert a.dropped == {"stale_frame": 2}
            a.join(plan(generation=3))
            await a.switch.send(frame(0, 1, generation=3))  # the same stream still works
            await settle()
            assert [m.generation for m, _ in b.worker] == [3]

    virtual(scenario())


def test_a_message_about_an_unknown_job_is_not_sent() -> None:
    async def scenario() -> None:
        async with swarm() as s:
            a, b = s.node(A), s.node(B, plan())
            await a.switch.send(frame(0, 1))
            await settle()
            assert (a.dropped, b.worker) == ({"stale_frame": 1}, [])

    virtual(scenario())


def test_a_message_for_a_slot_that_is_not_here_is_dropped_and_the_next_one_is_taken() -> None:
    async def scenario() -> None:
        async with swarm() as s:
            a, b = s.node(A, plan()), s.node(B, plan())
            stream = await a.stream_to(b)
            for message in (frame(0, 0), piece(0), TOKEN, FAILED):
                await stream.send(pack(message))
            await stream.send(pack(frame(0, 1)))
            await settle()
            assert b.dropped == {"misrouted_frame": 4}
            assert b.worker == [(frame(0, 1), b"")]

    virtual(scenario())


def test_a_message_without_a_receiver_is_dropped() -> None:
    async def scenario() -> None:
        async with swarm() as s:
            a = s.node(A, plan())
            b = s.node(B, plan(), worker=False)
            head = s.node(HEAD, plan(), worker=True)
            await a.switch.send(frame(0, 1))
            await a.switch.send(TOKEN)
            await settle()
            assert b.dropped == head.dropped == {"unexpected_frame": 1}
            assert (b.worker, head.worker, head.head) == ([], [], [])

    virtual(scenario())


@pytest.mark.parametrize(
    ("message", "counted"),
    [
        (frame(1, 1), "foreign_frame"),  # written for b's own slot
        (frame(5, 1), None),
        (frame(0, 5), None),
        (Ping(JOB), "bad_frame"),
        (Ping(JobId("f" * 16)), "bad_frame"),
    ],
    ids=[
        "slot of another",
        "no such source",
        "no such target",
        "no tensor",
        "no tensor of another job",
    ],
)
def test_a_peer_that_breaks_the_rules_loses_its_stream(
    message: Message, counted: str | None
) -> None:
    async def scenario() -> None:
        async with swarm() as s:
            a, b = s.node(A, plan()), s.node(B, plan())
            stream = await a.stream_to(b)
            await stream.send(pack(message))
            with pytest.raises(PeerLostError):
                await stream.receive()
            assert b.worker == []
            assert b.dropped == ({counted: 1} if counted else {})

    virtual(scenario())


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\0\0\0\1\xc0"])
def test_bytes_that_are_no_message_cost_the_stream_and_are_counted(data: bytes) -> None:
    async def scenario() -> None:
        async with swarm() as s:
            a, b = s.node(A, plan()), s.node(B, plan())
            stream = await a.stream_to(b)
            await stream.send(data)
            with pytest.raises(PeerLostError):
                await stream.receive()
            assert b.dropped == {"bad_frame": 1}

    virtual(scenario())


def test_a_peer_outside_the_plan_is_refused_and_counted() -> None:
    async def scenario() -> None:
        async with swarm() as s:
            stranger, b = s.node(STRANGER), s.node(B, plan())
            stream = await stranger.stream_to(b)
            await stream.send(pack(frame(0, 1)), b"poison")
            with pytest.raises(PeerLostError):
                await stream.receive()
            assert (b.worker, b.dropped) == ([], {"refused_peer": 1})
            assert not b.switch.names(STRANGER, JOB)
            assert b.switch.names(A, JOB)
            assert b.switch.names(HEAD, JOB)

    virtual(scenario())


def test_a_peer_that_only_ends_its_stream_is_not_counted() -> None:
    async def scenario() -> None:
        async with swarm() as s:
            a, b = s.node(A, plan()), s.node(B, plan())
            stream = await a.stream_to(b)
            await stream.close_write()
            with pytest.raises(EndOfStream):
                await stream.receive()
            broken = await a.stream_to(b)
            await broken.reset()
            await settle()
            assert b.dropped == {}

    virtual(scenario())


def test_sending_to_a_slot_that_the_plan_does_not_have_is_an_error() -> None:
    async def scenario() -> None:
        async with swarm() as s:
            a = s.node(A, plan())
            with pytest.raises(ProtocolError, match="no slot"):
                await a.switch.send(frame(0, 2))

    virtual(scenario())


def test_below_a_fence_nothing_is_passed_on_in_or_out() -> None:
    async def scenario() -> None:
        async with swarm() as s:
            a, b = s.node(A, plan()), s.node(B, plan())
            await a.switch.send(frame(0, 1))
            await settle()
            assert len(b.worker) == 1
            b.switch.fence(JOB, 2)
            await a.switch.send(frame(0, 1, mb=1))
            await b.switch.send(frame(1, 0))
            await settle()
            assert len(b.worker) == 1
            assert b.dropped == {"stale_frame": 2}
            assert a.worker == []
            for node in (a, b):
                node.join(plan(generation=2))
            await a.switch.send(frame(0, 1, generation=2))
            await settle()
            assert len(b.worker) == 2

    virtual(scenario())


def test_a_shadow_is_addressed_behind_the_slots() -> None:
    async def scenario() -> None:
        async with swarm() as s:
            watched = replace(plan(), shadows=((C,), ()))
            a, c = s.node(A, watched), s.node(C, watched)
            await a.switch.send(frame(0, 0, slot=1), b"reduced")
            await settle()
            assert [payload for _, payload in c.worker] == [b"reduced"]
            with pytest.raises(ProtocolError):
                await a.switch.send(frame(0, 0, slot=2))

    virtual(scenario())
