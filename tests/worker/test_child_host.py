"""Whoever is to do something else: what goes on about the former plan ends first."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from worker_node import GOOD, assign, node, plan

from swarmnode.domain import Generation
from swarmnode.messages import Message, Prepare, Prepared, StateSource, Traffic
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.worker import child_host, reports
from swarmnode.worker.child_host import ChildHost
from swarmnode.worker.files import state_path
from swarmnode.worker.reports import Reports
from swarmnode.worker.state_keeper import StateKeeper


class Fetching:
    """In place of what fetches: it ends when it may, also if it is cancelled, as a thread does."""

    def __init__(self) -> None:
        self.story: list[str] = []
        self.has_begun = asyncio.Event()
        self.may_end = asyncio.Event()

    def plan_handoffs(self, asked: Any, *_: object) -> dict[int, Any]:
        self.story.append(f"plan {asked.plan.generation}")
        return {}

    async def gather(self, asked: Any, *_: object) -> tuple[()]:
        generation = asked.plan.generation
        self.has_begun.set()
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            await self.may_end.wait()
            self.story.append(f"given up {generation}")
            raise
        self.story.append(f"done {generation}")
        return ()


class Host:
    """A host that starts no process, and what it says."""

    def __init__(self, host: ChildHost, fetching: Fetching, said: list[Message]) -> None:
        self.host = host
        self.fetching = fetching
        self.said = said

    async def goes_on(self) -> None:
        """All that may happen before the fetching ends has happened when this returns."""
        for _ in range(5):
            await asyncio.sleep(0)


@asynccontextmanager
async def host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Host]:
    async def start_no_child(_host: ChildHost) -> None: ...

    fetching, said = Fetching(), list[Message]()
    monkeypatch.setattr(child_host, "plan_handoffs", fetching.plan_handoffs)
    monkeypatch.setattr(child_host, "gather", fetching.gather)
    monkeypatch.setattr(ChildHost, "_start_child", start_no_child)
    async with node(folder) as n, asyncio.timeout(5):
        keeper = StateKeeper(folder / "job", n.store, starts_itself=True)
        made = ChildHost(GOOD, GOOD.canonical(), n.tools, keeper, said.append)
        made._is_warm.set()
        yield Host(made, fetching, said)


async def test_a_plan_is_carried_out_once_nobody_writes_for_former_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with host(tmp_path, monkeypatch) as h:
        async with asyncio.TaskGroup() as group:
            h.host.carry_out(assign(), group)
            await h.fetching.has_begun.wait()
            for generation in (2, 3):  # the second one is given up while it waits
                h.host.carry_out(assign(plan=plan(generation=generation)), group)
                await h.goes_on()
            story = list(h.fetching.story)
            h.fetching.may_end.set()
        assert story == ["plan 1"]
        assert h.fetching.story == ["plan 1", "given up 1", "plan 3", "done 3"]


async def test_a_later_plan_is_prepared_once_nobody_writes_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with host(tmp_path, monkeypatch) as h:
        async with asyncio.TaskGroup() as group:
            for generation in (1, 2):
                later = plan(generation=generation)
                h.host.prepare(Prepare(GOOD.job, later, 0, ((0, StateSource("init")),)), group)
                await h.fetching.has_begun.wait()
                await h.goes_on()
            story = list(h.fetching.story)
            h.fetching.may_end.set()
        assert story == ["plan 1"]
        assert h.fetching.story == ["plan 1", "given up 1", "plan 2", "done 2"]
        assert h.said == [Prepared(GOOD.job, Generation(2), 0)]


async def test_who_fetches_for_long_says_that_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a large state over a slow line is no hang."""
    monkeypatch.setattr(reports, "MOVES_S", 0.0)
    async with node(tmp_path) as n:
        said = list[Message]()
        made = Reports(GOOD.job, n.tools, said.append, lambda: None)
        made.look(1.0)
        assert said == []
        made.fetched(2.0)
        (told,) = said
        assert isinstance(told, Traffic)
        assert (told.is_moving, told.compute_s) == (True, 0.0)
        made.tell(3.0)
        assert isinstance(said[1], Traffic)
        assert not said[1].is_moving, "nothing has come since"


def test_states_that_the_log_disproves_go_before_it_is_overwritten(tmp_path: Path) -> None:
    """States 6 and 12 on the disk and 13 in memory, and a log that went another way from 8 on."""
    keeper = StateKeeper(tmp_path / "job", BlobStore(tmp_path / "blobs"), starts_itself=True)
    for step in (6, 12):
        path = state_path(keeper.directory, 0, step, "snapshot")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    keeper.memory = {0: 13, 1: 13}
    keeper.disprove(0, 8)
    assert keeper.holding(0).snapshots == (6,)
    assert keeper.memory == {1: 13}
