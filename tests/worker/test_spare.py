"""A worker child waits where there are jobs, and nowhere else. Real processes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from swarmnode.children import Child
from swarmnode.worker import spare as module
from swarmnode.worker.spare import Spare

pytestmark = pytest.mark.asyncio


@contextlib.asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Spare]:
    spare = Spare(1, folder / "worker.log")
    task = asyncio.create_task(spare.run())
    try:
        yield spare
    finally:
        task.cancel()
        await asyncio.wait([task])


async def waiting(spare: Spare) -> Child:
    async with asyncio.timeout(10):
        while (child := spare._waiting) is None:
            await asyncio.sleep(0.01)
    return child


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFILL_S", 0.0)


async def test_a_job_takes_the_child_that_waits_and_another_one_follows(tmp_path: Path) -> None:
    async with running(tmp_path) as spare:
        assert not psutil.Process().children(recursive=True), "no job, no child"
        with spare.wanted():
            first = await waiting(spare)
            taken = spare.take("for the job")
            assert (taken.pid, taken.name) == (first.pid, "for the job")
            assert (await waiting(spare)).pid != first.pid
        taken.close()
    assert not psutil.Process().children(recursive=True), "none outlives the service"


async def test_a_dead_child_is_not_given_away(tmp_path: Path) -> None:
    async with running(tmp_path) as spare:
        with spare.wanted():
            dead = (await waiting(spare)).pid
            psutil.Process(dead).kill()
            psutil.Process(dead).wait()
            taken = spare.take("for the job")
            assert taken.pid != dead
            assert taken.is_alive
        taken.close()


async def test_some_time_after_the_last_job_the_child_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEEP_S", 0.05)
    async with running(tmp_path) as spare:
        with spare.wanted():
            child = await waiting(spare)
        async with asyncio.timeout(10):
            while child.is_alive:
                await asyncio.sleep(0.01)
