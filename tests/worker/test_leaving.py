"""A node that wants to end says so until each of its coordinators has let it go."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest
from worker_node import (
    GOOD,
    ME,
    STRANGER,
    SUBMITTER,
    Node,
    answer,
    answered,
    ask,
    assign,
    inquire,
    node,
    plan,
)

from swarmnode.domain import Generation
from swarmnode.errors import PeerLostError
from swarmnode.handovers import HandOver, Leaving
from swarmnode.messages import (
    Adopt,
    Adopted,
    Answer,
    Failed,
    Inquire,
    Release,
)
from swarmnode.p2p.ports import EndOfStream, Stream
from swarmnode.wire import pack
from swarmnode.worker import fetching, hosting, service
from swarmnode.worker.service import slots_of


@pytest.fixture(autouse=True)
def _hastily(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "RETRY_S", ())
    monkeypatch.setattr(service, "SAY_AGAIN_S", 0.01)


async def assigned(n: Node, generation: int = 1) -> Stream:
    """A stream of the coordinator, whose assignment the node has taken."""
    stream = await n.stream()
    told = assign(plan=plan(generation=generation))
    await stream.send(pack(told), GOOD.canonical())
    assert isinstance(await answer(stream), Failed)
    return stream


async def test_it_is_said_again_until_the_node_is_released(tmp_path: Path) -> None:
    async with node(tmp_path) as n, asyncio.TaskGroup() as group:
        stream = await assigned(n)
        hosts = n.service.hosts()
        assert slots_of(hosts, ME.peer) == (f"{GOOD.job} 0/0",)
        leave = group.create_task(n.service.leave())
        for _ in range(3):
            assert await answer(stream) == Leaving(GOOD.job, Generation(1), 1)
        assert not leave.done()
        await stream.send(pack(Release(GOOD.job, "others do it now")))
        async with asyncio.timeout(5):
            await leave
        assert n.service.hosts() == ()
        assert slots_of(hosts, ME.peer) == (), "it was released for good before it may end"


async def test_whoever_coordinates_meanwhile_hears_it_too(tmp_path: Path) -> None:
    async with node(tmp_path) as n, asyncio.TaskGroup() as group:
        first = await assigned(n)
        leave = group.create_task(n.service.leave())
        assert isinstance(await answer(first), Leaving)
        second = await n.stream()
        await second.send(pack(assign(plan=plan(generation=2))), GOOD.canonical())
        while not isinstance(said := await answer(second), Leaving):
            assert isinstance(said, Failed)
        assert said.generation == 2
        await second.send(pack(Release(GOOD.job, "others do it now")))
        async with asyncio.timeout(5):
            await leave


async def test_a_voter_without_slots_says_it_too(tmp_path: Path) -> None:
    async with node(tmp_path) as n, asyncio.TaskGroup() as group:
        stream = await n.stream()
        signature = SUBMITTER.sign(GOOD.canonical())
        inquire = Inquire(GOOD.job, Generation(1), Generation(0), 0, signature)
        await stream.send(pack(inquire), GOOD.canonical())
        assert isinstance(await answer(stream), Answer)
        await stream.send(pack(Adopt(GOOD.job, plan(host=STRANGER.peer))))
        assert await answer(stream) == Adopted(GOOD.job, Generation(1))
        leave = group.create_task(n.service.leave())
        assert await answer(stream) == Leaving(GOOD.job, Generation(1), 1)
        await stream.reset()
        async with asyncio.timeout(5):
            await leave


async def test_what_nobody_took_over_is_still_its_own(tmp_path: Path) -> None:
    async with node(tmp_path) as n:
        stream = await assigned(n)
        hosts = n.service.hosts()
        await stream.reset()
        async with asyncio.timeout(5):
            await n.service.leave()
        assert slots_of(hosts, ME.peer) == (f"{GOOD.job} 0/0",)


async def test_whom_the_coordinator_named_is_awaited_and_told_too(tmp_path: Path) -> None:
    named: list[Any] = []
    async with node(tmp_path, on_named=named.append) as n, asyncio.TaskGroup() as group:
        first = await assigned(n)
        leave = group.create_task(n.service.leave())
        assert isinstance(await answer(first), Leaving)
        await first.send(pack(HandOver(GOOD.job, Generation(1), STRANGER.peer)))
        await ended(first)
        assert not leave.done(), "somebody is about to ask"
        second = await n.stream()
        await second.send(pack(assign(plan=plan(generation=2))), GOOD.canonical())
        while not isinstance(await answer(second), Leaving):
            pass
        await second.send(pack(Release(GOOD.job, "others do it now")))
        async with asyncio.timeout(5):
            await leave
    assert named == [], "it was another one"


async def test_who_was_named_hears_of_it_and_nobody_is_awaited_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosting, "HEIR_PATIENCE_S", 0.05)
    named: list[Any] = []
    async with node(tmp_path, on_named=named.append) as n, asyncio.TaskGroup() as group:
        stream = await assigned(n)
        leave = group.create_task(n.service.leave())
        await stream.send(pack(HandOver(GOOD.job, Generation(1), ME.peer)))
        async with asyncio.timeout(5):
            await leave
    assert named == [GOOD.job]


async def test_what_was_handed_over_in_an_earlier_generation_is_not_ours(tmp_path: Path) -> None:
    named: list[Any] = []
    async with node(tmp_path, on_named=named.append) as n:
        stream = await assigned(n, generation=2)
        await stream.send(pack(HandOver(GOOD.job, Generation(1), ME.peer)))
        await stream.send(pack(Release(GOOD.job, "over")))
        await ended(stream)
    assert named == []


async def ended(stream: Stream) -> None:
    """Returns when the other side has closed the stream."""
    async with asyncio.timeout(5):
        with contextlib.suppress(EndOfStream, PeerLostError):
            while True:
                await stream.receive()


async def test_who_takes_over_hears_it_before_the_answer(tmp_path: Path) -> None:
    async with node(tmp_path) as n, asyncio.TaskGroup() as group:
        first = await assigned(n)
        leave = group.create_task(n.service.leave())
        assert isinstance(await answer(first), Leaving)
        await first.send(pack(HandOver(GOOD.job, Generation(1), STRANGER.peer)))
        await ended(first)
        second = await ask(n, SUBMITTER, inquire(2, 1))
        assert isinstance(await answer(second), Leaving)
        assert (await answered(second)).granted
        await second.send(pack(Release(GOOD.job, "others do it now")))
        async with asyncio.timeout(5):
            await leave
