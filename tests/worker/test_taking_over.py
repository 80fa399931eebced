"""Taking a job over: beside the event loop, once at a time, whatever an earlier turn still does."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from standby_node import (
    FIRST,
    STARTED,
    SUBMITTER,
    StandbyNode,
    Submitter,
    byte_tokenizer,
    signed,
    standby,
    until,
)

from swarmnode.coordinator import events as on
from swarmnode.coordinator import job_files, service, succession
from swarmnode.coordinator.runner import JobRunner
from swarmnode.manifest import Manifest
from swarmnode.papers import Papers


@pytest.fixture(autouse=True)
def _without_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(succession, "PATIENCE_S", 0.0)


async def taken_over(node: StandbyNode, folder: Path) -> Manifest:
    """A job whose coordinator is gone, and which this node coordinates instead."""
    job = signed(byte_tokenizer(folder), node.store)
    submitter = await Submitter.begin(node, job)
    await submitter.adopt()
    await submitter.tell(FIRST, STARTED)
    await submitter.hang_up()
    await until(lambda: bool(node.coordinator.jobs))
    return job


def papers_of(node: StandbyNode, job: Manifest) -> Papers:
    papers = node.service.papers(job.job)
    assert papers is not None
    return papers


async def test_no_journal_is_read_and_no_file_opened_on_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, set[bool]] = {}

    def watch(module: Any, name: str) -> None:
        real = getattr(module, name)

        def watched(*args: Any, **named: Any) -> Any:
            is_loop = threading.current_thread() is threading.main_thread()
            threads.setdefault(name, set()).add(is_loop)
            return real(*args, **named)

        monkeypatch.setattr(module, name, watched)

    watch(service, "read_whole_journal")
    watch(service, "write_durably")
    watch(job_files, "write_durably")
    watch(job_files, "Journal")
    watch(job_files, "load_tokenizer")
    async with standby(tmp_path) as n:
        await taken_over(n, tmp_path)
    names = ("read_whole_journal", "write_durably", "Journal", "load_tokenizer")
    assert threads == {name: {False} for name in names}


async def test_who_takes_over_twice_at_once_runs_the_job_once(tmp_path: Path) -> None:
    async with standby(tmp_path) as n:
        job = await taken_over(n, tmp_path)
        papers = papers_of(n, job)
        first = n.coordinator.find(job.job).runner
        await first.give_up("tried again by two")
        await first.tell(on.Tick())
        await asyncio.wait(runs(job))
        both = (n.coordinator.take_over(papers), n.coordinator.take_over(papers))
        await asyncio.gather(*both)
        assert n.coordinator.find(job.job).runner is not first
        assert len(runs(job)) == 1


async def test_what_a_node_knows_of_its_own_journal_is_told_only_once_it_was_read(
    tmp_path: Path,
) -> None:
    """Else somebody who knows less would be elected by it."""
    async with standby(tmp_path) as n:
        job = await taken_over(n, tmp_path)
    async with standby(tmp_path) as n:
        told = asyncio.ensure_future(n.coordinator.num_lines(job.job))
        assert not (await asyncio.wait([told], timeout=0.05))[0]
        await n.restore()
        assert await told == 2


@pytest.mark.parametrize("is_again", [True, False])
async def test_the_late_end_of_an_earlier_turn_takes_no_file_of_the_next(
    is_again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = asyncio.Event()

    async def say_goodbye(_runner: JobRunner) -> None:
        await late.wait()

    monkeypatch.setattr(JobRunner, "_say_goodbye", say_goodbye)
    async with standby(tmp_path) as n:
        job = await taken_over(n, tmp_path)
        running = n.coordinator.find(job.job)
        earlier = runs(job)
        running.ledger._hand_over(SUBMITTER.peer)
        await running.runner.tell(on.Tick())
        if is_again:
            await n.coordinator.take_over(papers_of(n, job))
        late.set()
        await asyncio.wait(earlier)
        assert (running.directory / "job.json").exists() == is_again


def runs(job: Manifest) -> list["asyncio.Task[Any]"]:
    """The turns of a job as its coordinator that go on."""
    return [
        task
        for task in asyncio.all_tasks()
        if task.get_name() == f"job {job.job}"
        and task.get_coro().__qualname__ == "CoordinatorService._run"  # type: ignore[union-attr]
    ]
