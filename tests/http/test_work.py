"""Long work in a thread: told while it goes on, ended when nobody listens any more."""

import asyncio
import threading

import pytest

from swarmnode.errors import SwarmError
from swarmnode.http import work
from swarmnode.http.work import Counted


@pytest.fixture(autouse=True)
def _tells_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "TELL_S", 0.01)


async def test_how_far_it_is_comes_in_order_and_ends_with_the_work() -> None:
    counted, go_on = Counted(100), threading.Event()

    def works() -> str:
        counted.add(40)
        assert go_on.wait(10)
        counted.add(70)
        return "done"

    task = asyncio.ensure_future(asyncio.to_thread(works))
    seen = []
    async for each in counted.until(task):
        seen.append(each.done_bytes)
        if each.done_bytes == 40:
            go_on.set()
    assert task.result() == "done"
    assert seen == sorted(seen)
    assert 40 in seen
    assert max(seen) <= 100, "never more than there is"


async def test_when_nobody_listens_the_thread_ends() -> None:
    counted, ended = Counted(100), threading.Event()

    def works() -> None:
        try:
            while True:
                counted.add(1)
                threading.Event().wait(0.001)
        except SwarmError:
            ended.set()
            raise

    task = asyncio.ensure_future(asyncio.to_thread(works))
    steps = counted.until(task)
    await anext(aiter(steps))
    await steps.aclose()  # type: ignore[attr-defined]
    assert await asyncio.to_thread(ended.wait, 10)
    await asyncio.wait({task})
    assert task.cancelled() or isinstance(task.exception(), SwarmError)
