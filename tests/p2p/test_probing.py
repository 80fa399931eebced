"""Probes: both ends learn, a burst is timed where it arrives, and nobody is probed to death."""

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgpack
import pytest
from advert_makers import advert, identity
from switch_nodes import virtual
from transport_worlds import libp2p_world

from swarmnode.domain import Advert, Coordinate, PeerId
from swarmnode.errors import PeerLostError
from swarmnode.p2p import prober as probers
from swarmnode.p2p import probing
from swarmnode.p2p.links import LinkTable
from swarmnode.p2p.memory import MemoryNetwork, MemoryStream, MemoryTransport
from swarmnode.p2p.ports import EndOfStream, Stream
from swarmnode.p2p.prober import Prober
from swarmnode.p2p.probing import PAUSE_S, PIECE_BYTES, Responder, probe
from swarmnode.wire import PROBE_PROTOCOL

ME, OTHER = (identity(number).peer for number in (1, 2))
PLACE = Coordinate(0.01, 0.02, 0.0, 0.001, 0.3)
DELAY_S = 0.02
BYTES_PER_S = 2e6


@pytest.fixture
def slow_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every message takes DELAY_S and its size over BYTES_PER_S, as a link with a queue."""
    receive, send = MemoryStream.receive, MemoryStream.send

    async def slow_send(stream: MemoryStream, *parts: Any) -> None:
        await asyncio.sleep(sum(len(part) for part in parts) / BYTES_PER_S)
        await send(stream, *parts)

    async def late_receive(stream: MemoryStream) -> bytes | bytearray:
        is_waiting = not stream._messages
        message = await receive(stream)
        await asyncio.sleep(DELAY_S if is_waiting and len(message) < 1024 else 0.0)
        return message

    monkeypatch.setattr(MemoryStream, "send", slow_send)
    monkeypatch.setattr(MemoryStream, "receive", late_receive)


class End:
    """A node that answers probes."""

    def __init__(self, transport: MemoryTransport) -> None:
        self.transport, self.table = transport, LinkTable()
        self.dropped: Counter[str] = Counter()
        Responder(
            transport, self.table, lambda: PLACE, lambda why: self.dropped.update([why]), now_s
        )

    async def probe(self, other: PeerId, *, with_burst: bool = True) -> probing.Probe | None:
        return await probe(
            self.transport, other, (), self.table, with_burst=with_burst, clock=now_s
        )

    async def stream(self, other: PeerId) -> Stream:
        return await self.transport.open(other, (), PROBE_PROTOCOL, max_message_bytes=1 << 20)


@asynccontextmanager
async def ends() -> AsyncIterator[tuple[End, End]]:
    async with MemoryNetwork() as network:
        yield End(network.transport(ME)), End(network.transport(OTHER))


def now_s() -> float:
    return asyncio.get_running_loop().time()


def pack(*fields: Any) -> bytes:
    return bytes(msgpack.packb(fields))


async def read_all(stream: Stream) -> None:
    while True:
        await stream.receive()


# ---- the protocol ------------------------------------------------------------------------------


def test_a_probe_tells_both_ends_what_the_link_is_like(slow_link: None) -> None:
    async def scenario() -> None:
        async with ends() as (me, other):
            found = await me.probe(OTHER)
            assert found is not None
            assert found.coordinate == PLACE
            assert found.rtt_s == pytest.approx(2 * DELAY_S, rel=0.05)
            here, there = me.table.estimate(OTHER, now_s()), other.table.estimate(ME, now_s())
            assert here is not None
            assert there is not None
            assert here.latency_s == pytest.approx(DELAY_S, rel=0.05)
            assert here.bytes_per_s == pytest.approx(BYTES_PER_S, rel=0.05)
            assert there.received_bytes_per_s == here.bytes_per_s
            assert (here.received_bytes_per_s, there.bytes_per_s) == (None, None)
            assert (me.dropped, other.dropped) == ({}, {})

    virtual(scenario())


def test_a_ping_alone_sends_no_burst() -> None:
    async def scenario() -> None:
        async with ends() as (me, other):
            assert await me.probe(OTHER, with_burst=False) is not None
            assert other.table.estimates(now_s()) == {}

    virtual(scenario())


def test_both_ends_hear_how_their_transfers_arrive(slow_link: None) -> None:
    async def scenario() -> None:
        async with ends() as (me, other):
            me.table.observe_transfer(OTHER, 1 << 20, 1.0, now_s())
            other.table.observe_transfer(ME, 1 << 20, 0.5, now_s())
            await me.probe(OTHER, with_burst=False)
            here, there = me.table.estimate(OTHER, now_s()), other.table.estimate(ME, now_s())
            assert here is not None
            assert there is not None
            assert (here.bytes_per_s, there.bytes_per_s) == (1 << 21, 1 << 20)
            assert here.source == there.source == "transfer"

    virtual(scenario())


def test_a_slow_link_is_not_burdened_with_a_large_burst(
    slow_link: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "BYTES_PER_S", 50e3)

    async def scenario() -> float:
        async with ends() as (me, _):
            await me.probe(OTHER)
            estimate = me.table.estimate(OTHER, now_s())
            assert estimate is not None
            assert estimate.bytes_per_s == pytest.approx(50e3, rel=0.05)
            return now_s()

    assert virtual(scenario()) < 2.0, "64 KiB, not 1 MiB"


async def test_a_probe_works_over_the_real_transport() -> None:
    async with libp2p_world() as world:
        here, there = LinkTable(), LinkTable()
        Responder(world.there, there, lambda: PLACE)
        found = await probe(
            world.here, world.there.peer, world.there.addresses, here, with_burst=True
        )
        assert found is not None
        assert found.coordinate == PLACE
        estimate = here.estimate(world.there.peer, time.monotonic())
        assert estimate is not None
        assert estimate.latency_s is not None
        assert 0.0 < estimate.latency_s < 0.5
        assert estimate.bytes_per_s is not None
        assert estimate.bytes_per_s > 1e6


# ---- hostile peers -----------------------------------------------------------------------------


def test_a_peer_that_comes_too_often_is_turned_away(slow_link: None) -> None:
    async def scenario() -> None:
        async with ends() as (me, other):
            assert await me.probe(OTHER, with_burst=False) is not None
            assert await me.probe(OTHER, with_burst=False) is None
            assert other.dropped == {"refused_probe": 1}
            await asyncio.sleep(PAUSE_S)
            assert await me.probe(OTHER, with_burst=False) is not None

    virtual(scenario())


def test_no_more_probes_than_a_few_are_served_at_once() -> None:
    async def scenario() -> None:
        async with MemoryNetwork() as network:
            other = End(network.transport(OTHER))
            held = [
                await End(network.transport(PeerId(f"p{n}"))).stream(OTHER)
                for n in range(probing.MAX_PROBES)
            ]
            await asyncio.sleep(0.1)
            late = End(network.transport(PeerId("late")))
            assert await late.probe(OTHER) is None
            assert other.dropped == {"refused_probe": 1}
            await asyncio.sleep(probing.TIMEOUT_S)
            with pytest.raises(EndOfStream):
                await held[0].receive()
            assert await late.probe(OTHER, with_burst=False) is not None

    virtual(scenario())


@pytest.mark.parametrize(
    "messages",
    [
        [b"nonsense"],
        [b""],
        [pack("ping")],
        [pack("ping", 1)],
        [pack("burst", 1 << 21)],
        [pack("burst", 0)],
        [pack("burst", True)],
        [pack("burst", 100), bytes(101)],
        [pack("burst", 100), b""],
        [pack("ping", 0.0)] * (probing.MAX_PINGS + 1),
        [pack("burst", 1), b"x"] * (probing.MAX_BURSTS + 1),
        [bytes(PIECE_BYTES + 1)],
    ],
    ids=lambda messages: f"{messages[0][:12]!r}x{len(messages)}",
)
def test_anything_else_ends_the_stream(messages: list[bytes]) -> None:
    async def scenario() -> None:
        async with ends() as (me, other):
            stream = await me.stream(OTHER)
            for message in messages:
                await stream.send(message)
            with pytest.raises(PeerLostError):
                await read_all(stream)
            assert other.table.estimates(now_s()) == {}

    virtual(scenario())


@pytest.mark.parametrize(
    "answers",
    [
        [b"nonsense"],
        [pack("pong")],
        [pack("pong", [0.0] * 4, 0.0)],
        [pack("pong", [0, 0, 0, 0, 0], 0.0)],
        [pack("pong", [0.0] * 5, "fast")],
        [pack("pong", [0.0] * 5, 0.0)] * 4 + [pack("gone")],
        [pack("pong", [0.0] * 5, 0.0)] * 4 + [pack("go"), pack("got", 1 << 30, 0.1)],
        [pack("pong", [0.0] * 5, 0.0)] * 4 + [pack("go"), pack("got", 1, "soon")],
        [],
    ],
)
def test_a_responder_that_breaks_the_rules_teaches_no_bandwidth(answers: list[bytes]) -> None:
    async def lie(stream: Stream) -> None:
        for answer in answers:
            await stream.send(answer)
        await asyncio.sleep(100.0)

    async def scenario() -> None:
        async with MemoryNetwork() as network:
            network.transport(OTHER).serve(PROBE_PROTOCOL, lie, max_message_bytes=1 << 20)
            me = End(network.transport(ME))
            assert await me.probe(OTHER) is None
            estimate = me.table.estimate(OTHER, now_s())
            assert estimate is None or estimate.bytes_per_s is None
            assert now_s() <= probing.TIMEOUT_S

    virtual(scenario())


def test_lies_about_coordinates_and_rates_change_nothing() -> None:
    async def lie(stream: Stream) -> None:
        for _ in range(probing.NUM_PINGS):
            await stream.receive()
            await asyncio.sleep(0.01)
            await stream.send(pack("pong", [math.nan, 1e300, 0.0, -5.0, 0.0], math.inf))
        await asyncio.sleep(1.0)

    async def scenario() -> None:
        async with MemoryNetwork() as network:
            network.transport(OTHER).serve(PROBE_PROTOCOL, lie, max_message_bytes=1 << 20)
            prober = swarm_prober(network, [OTHER])
            before = prober.coordinate
            await prober.visit_some()
            assert prober.coordinate == before

    virtual(scenario())


# ---- the loop ----------------------------------------------------------------------------------


def swarm_prober(
    network: MemoryNetwork,
    peers: list[PeerId],
    table: LinkTable | None = None,
    partners: Callable[[], frozenset[PeerId]] = frozenset,
) -> Prober:
    def adverts() -> list[Advert]:
        return [advert(identity(1), 1e9, peer=peer) for peer in [ME, *peers]]

    table = table or LinkTable()
    return Prober(network.transport(ME), table, adverts, partners, random.Random(0), now_s)


def answering(network: MemoryNetwork, count: int) -> dict[PeerId, End]:
    peers = [PeerId(f"p{number}") for number in range(count)]
    return {peer: End(network.transport(peer)) for peer in peers}


def test_a_round_visits_few_and_everybody_in_turn(slow_link: None) -> None:
    async def scenario() -> None:
        async with MemoryNetwork() as network:
            others = answering(network, 8)
            table = LinkTable()
            prober = swarm_prober(network, list(others), table)
            sizes = []
            for _ in range(3):
                is_done = await prober.visit_some()
                sizes.append((len(table.estimates(now_s())), is_done))
                await asyncio.sleep(PAUSE_S)
            assert sizes == [(3, False), (6, False), (8, True)]
            assert prober.coordinate.error < 1.0
            assert prober.reach().coordinate == prober.coordinate
            assert prober.reach().uplink_bytes_per_s == pytest.approx(BYTES_PER_S, rel=0.1)

    virtual(scenario())


def test_peers_of_a_common_job_come_first(slow_link: None) -> None:
    async def scenario() -> None:
        async with MemoryNetwork() as network:
            others = answering(network, 20)
            table, partners = LinkTable(), frozenset([PeerId("p7"), PeerId("p13")])
            prober = swarm_prober(network, list(others), table, lambda: partners)
            await prober.visit_some()
            assert partners < set(table.estimates(now_s()))

    virtual(scenario())


def test_where_a_transfer_has_told_the_bandwidth_no_burst_is_sent(slow_link: None) -> None:
    async def scenario() -> None:
        async with MemoryNetwork() as network:
            others = answering(network, 2)
            table = LinkTable()
            first, second = others
            others[first].table.observe_transfer(ME, 1 << 20, 0.1, now_s())
            prober = swarm_prober(network, list(others), table)
            table.hear(first, 1e7, now_s())
            await prober.visit_some()
            links = table.estimates(now_s())
            assert (links[first].source, links[second].source) == ("transfer", "probe")
            assert others[first].table.estimates(now_s())[ME].received_bytes_per_s == 10 * (1 << 20)
            assert others[second].table.estimates(now_s())[ME].received_bytes_per_s is not None

    virtual(scenario())


def test_bursts_to_strangers_become_rare(slow_link: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probers, "FREE_BURSTS", 2)

    async def scenario() -> int:
        async with MemoryNetwork() as network:
            others = answering(network, 9)
            table = LinkTable()
            prober = swarm_prober(network, list(others), table)
            for _ in range(3):
                await prober.visit_some()
            return sum(link.bytes_per_s is not None for link in table.estimates(now_s()).values())

    assert virtual(scenario()) == 2


def test_a_peer_that_is_not_there_does_not_stop_the_round(slow_link: None) -> None:
    async def scenario() -> None:
        async with MemoryNetwork() as network:
            others = answering(network, 2)
            table = LinkTable()
            prober = swarm_prober(network, [PeerId("nobody"), *others], table)
            assert await prober.visit_some()
            assert set(table.estimates(now_s())) == set(others)

    virtual(scenario())


def test_the_loop_begins_soon_and_goes_on_slowly(slow_link: None) -> None:
    async def scenario() -> None:
        async with MemoryNetwork() as network, asyncio.TaskGroup() as group:
            (other,) = answering(network, 1).values()
            table = LinkTable()
            task = group.create_task(swarm_prober(network, ["p0"], table).run())  # type: ignore[list-item]
            await asyncio.sleep(2 * probers.FIRST_S)
            assert len(table.estimates(now_s())) == 1
            await asyncio.sleep(20 * probers.ROUND_S)
            assert other.dropped == {}, "never too often"
            (link,) = table.estimates(now_s()).values()
            assert link.age_s < 2 * probers.ROUND_S
            task.cancel()

    virtual(scenario())
