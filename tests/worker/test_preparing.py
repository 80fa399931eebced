"""Whoever is to get slots soon: it fetches, and starts the process that will compute."""

import asyncio
from pathlib import Path

import pytest
from engine_swarm import TIED, make_manifest
from test_takeover import VOTERS, Coordinator, answered, ask, inquire, lone_node
from worker_node import ME, SUBMITTER

from swarmnode.domain import Generation, Plan
from swarmnode.messages import Prepare, Prepared, StateSource


@pytest.mark.processes
async def test_who_prepares_is_ready_once_its_process_could_compute(tmp_path: Path) -> None:
    """All others wait for it from the moment that it gets a slot: starting takes seconds."""
    made = make_manifest(tmp_path / "blobs", TIED, stages=1, slots=1, num_microbatches=2)
    job = made.model_copy(update={"submitter": SUBMITTER.peer})
    async with lone_node(tmp_path) as n:
        stream = await ask(n, SUBMITTER, inquire(1, 0, job), job)
        assert (await answered(stream)).granted
        first = Coordinator(stream, job, 1, [])
        plan = Plan(Generation(1), ((0, 4),), ((ME.peer,),), SUBMITTER.peer, voters=VOTERS)
        await first.tell(Prepare(job.job, plan, 0, ((0, StateSource("init")),)))
        (host,) = n.service.hosts()
        async with asyncio.timeout(10):
            while host.child_pid is None:  # noqa: ASYNC110 - the message is on its way
                await asyncio.sleep(0.001)
        stream = await ask(n, SUBMITTER, inquire(2, 0, job), job)
        assert not (await answered(stream)).is_warm, "it imports its libraries"
        second = Coordinator(stream, job, 2, [])
        assert (await second.receive(Prepared)).step == 0
        assert (await answered(await ask(n, SUBMITTER, inquire(3, 0, job), job))).is_warm
