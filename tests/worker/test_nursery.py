"""Worker children are forks of one process, where there are jobs and nowhere else. All real."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from swarmnode.children import Child
from swarmnode.engine_messages import Warm
from swarmnode.errors import ChildError
from swarmnode.wire import unpack_local
from swarmnode.worker import nursery as module
from swarmnode.worker.nursery import Nursery

pytestmark = [pytest.mark.asyncio, pytest.mark.processes]


@contextlib.asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Nursery]:
    nursery = Nursery(1, folder / "worker.log")
    task = asyncio.create_task(nursery.run())
    await asyncio.sleep(0)
    try:
        yield nursery
    finally:
        task.cancel()
        await asyncio.wait([task])


Ours = Callable[[], list[psutil.Process]]


@pytest.fixture
def ours() -> Ours:
    """Our children; a swarm that other tests share was there before."""
    before = {process.pid for process in psutil.Process().children()}
    return lambda: [p for p in psutil.Process().children() if p.pid not in before]


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - a process has no event
            await asyncio.sleep(0.01)


async def is_warm(child: Child) -> bool:
    message, _ = unpack_local(await child.receive())
    return isinstance(message, Warm)


async def test_children_are_forks_that_compute_and_end_with_their_own_status(
    tmp_path: Path,
    ours: Ours,
) -> None:
    async with running(tmp_path) as nursery:
        assert ours() == [], "no job, no process"
        with nursery.wanted():
            first, second = await nursery.child("first"), await nursery.child("second")
            (parent,) = ours()
            forks = {process.pid for process in parent.children()}
            assert {first.pid, second.pid} <= forks
            assert await is_warm(first)
            assert await is_warm(second)
            psutil.Process(first.pid).kill()
            with pytest.raises(ChildError, match="first ended with SIGKILL"):
                await first.receive()
            assert await second.stop() == 0, "at the end of its pipe it ends in order"
            await first.stop()
    assert ours() == [], "none outlives the service"


async def test_a_child_that_died_while_it_waited_is_not_given_away(
    tmp_path: Path, ours: Ours
) -> None:
    async with running(tmp_path) as nursery:
        with nursery.wanted():
            used = await nursery.child("used")
            (parent,) = ours()
            await until(lambda: len(parent.children()) == 2)
            waiting = [p for p in parent.children() if p.pid != used.pid]
            waiting[0].kill()
            psutil.wait_procs(waiting, timeout=10)
            child = await nursery.child("next")
            assert child.pid != waiting[0].pid
            assert await is_warm(child)
            await child.stop()
            await used.stop()


async def test_one_may_end_while_another_is_born(tmp_path: Path) -> None:
    """Both are told on the same socket: who waits for one must not lose the other."""
    async with running(tmp_path) as nursery:
        with nursery.wanted():
            for _ in range(20):
                async with asyncio.timeout(30):
                    child = await nursery.child("short-lived")
                await asyncio.sleep(0)  # the next one has been asked for
                await child.close()


async def test_if_the_nursery_dies_its_children_do_and_the_next_come_from_another(
    tmp_path: Path,
    ours: Ours,
) -> None:
    async with running(tmp_path) as nursery:
        with nursery.wanted():
            child = await nursery.child("orphan")
            (parent,) = ours()
            parent.send_signal(signal.SIGKILL)
            assert await child.wait() == -signal.SIGKILL
            await child.stop()
            after = await nursery.child("after")
            assert await is_warm(after)
            await after.stop()


async def test_some_time_after_the_last_job_the_nursery_ends(
    tmp_path: Path, ours: Ours, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as nursery:
        with nursery.wanted():
            child = await nursery.child("only")
            (parent,) = ours()
            await child.stop()
            monkeypatch.setattr(module, "KEEP_S", 0.05)
        nursery._kept_until_s = 0.0
        await until(lambda: not parent.is_running())
