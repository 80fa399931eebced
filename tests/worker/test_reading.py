"""A daemon that was started again reads what it holds before it answers."""

import os
from pathlib import Path

import pytest
from worker_node import GOOD, SUBMITTER, answer, answered, ask, inquire, node

from swarmnode.heartbeats import Checking
from swarmnode.messages import Answer
from swarmnode.worker.training.log import UpdateLog


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a file that is read slowly")
async def test_who_asks_hears_that_the_disk_is_read_until_the_answer(tmp_path: Path) -> None:
    async with node(tmp_path) as n:
        assert (await answered(await ask(n, SUBMITTER, inquire(1, 0)))).granted
    log = UpdateLog(tmp_path / "jobs" / GOOD.job / "stage-0")
    log.write(5, [b"an update"])
    slow = log.index_path(5)
    slow.unlink()
    os.mkfifo(slow)  # whoever reads it waits for a writer
    async with node(tmp_path) as n:
        stream = await ask(n, SUBMITTER, inquire(2, 0))
        for _ in range(3):
            assert await answer(stream) == Checking(GOOD.job)
        impatient = await ask(n, SUBMITTER, inquire(2, 0))
        await impatient.reset()
        with slow.open("wb"):
            pass
        while (found := await answer(stream)) == Checking(GOOD.job):
            pass
        assert isinstance(found, Answer)
        assert found.granted
        assert not slow.exists(), "it was read, and is damaged"
