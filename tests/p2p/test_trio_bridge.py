"""Calls from asyncio into a trio thread: results, errors, cancellation, and its end."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.lowlevel

from swarmnode.p2p.trio_bridge import TrioBridge


@asynccontextmanager
async def resource() -> AsyncIterator[str]:
    yield "resource"


async def test_a_call_gives_its_result_from_another_thread() -> None:
    async def work(number: int) -> tuple[int, str]:
        await trio.lowlevel.checkpoint()
        return number + 1, threading.current_thread().name

    async with TrioBridge.start("bridge-test", resource) as bridge:
        assert bridge.resource == "resource"
        assert await bridge.call(work, 1) == (2, "bridge-test")
    assert "bridge-test" not in {thread.name for thread in threading.enumerate()}


async def test_an_exception_comes_back() -> None:
    async def fail() -> None:
        raise KeyError("x")

    async with TrioBridge.start("bridge-test", resource) as bridge:
        with pytest.raises(KeyError):
            await bridge.call(fail)


async def test_cancelling_reaches_the_trio_side_before_the_caller_goes_on() -> None:
    started, seen = asyncio.Event(), []

    async with TrioBridge.start("bridge-test", resource) as bridge:

        async def hang() -> None:
            bridge.tell(started.set)
            try:
                await trio.sleep_forever()
            except trio.Cancelled:
                seen.append("cancelled")
                raise

        async with asyncio.TaskGroup() as group:
            task = group.create_task(bridge.call(hang))
            await started.wait()
            task.cancel()
        assert task.cancelled()
        assert seen == ["cancelled"]


async def test_a_result_that_comes_after_a_cancellation_is_disposed_of() -> None:
    done = threading.Event()
    disposed: asyncio.Queue[str] = asyncio.Queue()

    async def work() -> str:
        done.set()
        return "result"

    async with TrioBridge.start("bridge-test", resource) as bridge:

        async def dispose(result: str) -> None:
            bridge.tell(disposed.put_nowait, result)

        task = asyncio.create_task(bridge.call(work, dispose=dispose))
        await asyncio.sleep(0)
        assert done.wait(5)  # this side stands still, so it cannot have the result yet
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert await asyncio.wait_for(disposed.get(), 5) == "result"
        assert await bridge.call(work, dispose=dispose) == "result"
    assert disposed.empty()


async def test_a_timeout_cancels_the_trio_side() -> None:
    async with TrioBridge.start("bridge-test", resource) as bridge:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await bridge.call(trio.sleep_forever)


async def test_a_crash_fails_what_is_pending_and_what_comes_after() -> None:
    @asynccontextmanager
    async def fragile() -> AsyncIterator[trio.Event]:
        async with trio.open_nursery() as nursery:
            crash = trio.Event()

            async def wait_and_crash() -> None:
                await crash.wait()
                raise RuntimeError("crash")

            nursery.start_soon(wait_and_crash)
            yield crash

    async with TrioBridge.start("bridge-test", fragile) as bridge:
        async with asyncio.TaskGroup() as group:
            pending = group.create_task(_expect_run_finished(bridge))
            bridge.post(bridge.resource.set)
            with pytest.raises(trio.RunFinishedError):
                await bridge.wait_crashed()
            await pending
        await _expect_run_finished(bridge)


async def _expect_run_finished(bridge: TrioBridge[trio.Event]) -> None:
    with pytest.raises(trio.RunFinishedError):
        await bridge.call(trio.sleep_forever)


async def test_a_failing_start_is_reported() -> None:
    @asynccontextmanager
    async def broken() -> AsyncIterator[None]:
        raise OSError("no port")
        yield

    with pytest.raises(OSError, match="no port"):
        async with TrioBridge.start("bridge-test", broken):
            pytest.fail("must not start")
