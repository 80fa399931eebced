"""What a worker tells its coordinator of its links."""

from pathlib import Path

import pytest
from worker_node import GOOD, STRANGER, SUBMITTER, answer, assign, node

from swarmnode.engine_messages import Busy
from swarmnode.messages import (
    Failed,
    LinkReport,
    Traffic,
)
from swarmnode.wire import pack
from swarmnode.worker import fetching
from swarmnode.worker.child_host import REPORT_S


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
