"""What a worker tells its coordinator of its links."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from worker_node import GOOD, ME, STRANGER, SUBMITTER, answer, assign, manifest, node

from swarmnode.domain import Generation, Plan, SlotId
from swarmnode.engine_messages import Busy
from swarmnode.manifest import PlacementConfig
from swarmnode.messages import (
    Failed,
    Frame,
    LinkReport,
    Traffic,
)
from swarmnode.p2p.ports import Stream
from swarmnode.wire import MAX_TENSOR_BYTES, TENSOR_PROTOCOL, pack
from swarmnode.worker import fetching, reports
from swarmnode.worker.child_watch import ChildWatch
from swarmnode.worker.reports import REPORT_S


async def test_the_coordinator_is_told_of_the_links_to_peers_of_its_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "RETRY_S", ())
    async with node(tmp_path) as n:
        n.links = tuple(LinkReport(who.peer, 0.02, 1e6) for who in (SUBMITTER, STRANGER))
        stream = await n.stream()
        await stream.send(pack(assign()), GOOD.canonical())
        assert isinstance(await answer(stream), Failed)
        (host,) = n.service.hosts()
        await host._work._from_child(Busy(GOOD.job, REPORT_S + 1), memoryview(b""))
        traffic = await answer(stream)
        assert isinstance(traffic, Traffic)
        assert traffic.links == (LinkReport(SUBMITTER.peer, 0.02, 1e6),)


async def test_while_tensors_leave_the_coordinator_is_told_although_nothing_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "RETRY_S", ())
    arrived = asyncio.Event()

    async def take(stream: Stream) -> None:
        await stream.receive()
        arrived.set()
        await asyncio.Event().wait()

    job = manifest(placement=PlacementConfig(stages=2))
    hosts = ((ME.peer,), (STRANGER.peer,))
    there = Plan(Generation(1), ((0, 1), (1, 2)), hosts, SUBMITTER.peer)
    child: Any = SimpleNamespace(send=lambda _: asyncio.sleep(0))
    async with node(tmp_path) as n:
        n.network.transport(STRANGER.peer).serve(
            TENSOR_PROTOCOL, take, max_message_bytes=MAX_TENSOR_BYTES
        )
        stream = await n.stream()
        await stream.send(pack(assign(job, plan=there)), job.canonical())
        assert isinstance(await answer(stream), Failed)
        monkeypatch.setattr(reports, "MOVES_S", 0.0)
        (host,) = n.service.hosts()
        frame = Frame(
            job.job, Generation(1), 0, "activation", SlotId(0, 0), SlotId(1, 0), 0, 0, 0, (1,)
        )
        await n.tools.switch.send(frame, bytes(4))
        await arrived.wait()
        for _ in range(2):  # the second time nothing has left since
            await host._work._look_at(child, ChildWatch(100.0))
        await host._work._from_child(Busy(job.job, REPORT_S + 1), memoryview(b""))
        told = [await answer(stream) for _ in range(2)]
        assert all(isinstance(each, Traffic) for each in told)
        assert [(each.is_moving, each.compute_s > 0) for each in told] == [
            (True, False), (False, True),
        ]  # fmt: skip
