"""A promise that is given up half-way: what is on the disk stays in step with what was said."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from worker_node import GOOD, SUBMITTER, Node, node

from swarmnode.domain import Generation
from swarmnode.messages import Inquire
from swarmnode.worker import hosting
from swarmnode.worker.hosting import JobHost
from swarmnode.worker.state_keeper import load_tenancy

SIGNATURE = SUBMITTER.sign(GOOD.canonical())


class Slow:
    """A function that waits in its thread until it may go on, the first time."""

    def __init__(self, real: Any) -> None:
        self.said: list[str] = []
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()
        self._real = real

    def __call__(self, *args: Any) -> None:
        self.said.append("begin")
        self.has_begun.set()
        assert self.may_go_on.wait(30)
        self._real(*args)
        self.said.append("end")


def host_of(n: Node) -> JobHost:
    return JobHost(GOOD, GOOD.canonical(), SIGNATURE, n.tools)


def inquire(generation: int) -> Inquire:
    return Inquire(GOOD.job, Generation(generation), Generation(1), 0, SIGNATURE)


async def test_a_cancelled_promise_is_written_before_the_next_one_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with asyncio.timeout(30), node(tmp_path) as n:
        host, slow = host_of(n), Slow(hosting.save_tenancy)
        monkeypatch.setattr(hosting, "save_tenancy", slow)
        first = asyncio.ensure_future(host.consider(inquire(2), SUBMITTER.peer))
        await asyncio.to_thread(slow.has_begun.wait)
        first.cancel()
        second = asyncio.ensure_future(host.consider(inquire(3), SUBMITTER.peer))
        await asyncio.wait([second], timeout=0.05)
        assert slow.said == ["begin"], "the second one waits for the first one's thread"
        slow.may_go_on.set()
        answer = await second
        assert first.cancelled()
        assert answer is not None
        assert answer.granted
        assert slow.said == ["begin", "end"] * 2
        found = load_tenancy(n.folder / "jobs" / GOOD.job)
        assert found is not None
        assert found[0].promised == 3
