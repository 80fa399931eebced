"""What a daemon that runs for weeks deletes of the jobs of others, and what it keeps."""

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from standby_node import FIRST, Submitter, signed, standby, until
from test_standby_faults import SURROGATE, put_states

from swarmnode.coordinator import succession
from swarmnode.coordinator.events import CheckpointRecord, EndRecord
from swarmnode.coordinator.journal import _line
from swarmnode.home import KEPT_S
from swarmnode.manifest import Manifest
from swarmnode.sweeping import SWEEP_S, sweep_daily

END = EndRecord("stopped", "done")


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(succession, "PATIENCE_S", 1e6)


def leave_journal(folder: Path, checkpoints: Sequence[CheckpointRecord]) -> None:
    """What an earlier life left of a job that it coordinated."""
    own = folder / "led" / "1234"
    own.mkdir(parents=True)
    (own / "journal").write_bytes(b"".join(map(_line, [FIRST, *checkpoints])))


async def test_the_checkpoints_of_a_job_go_with_its_journal_once_it_has_ended(
    tmp_path: Path,
) -> None:
    async with standby(tmp_path) as n:
        job, states = signed(SURROGATE, n.store), put_states(n.store, b"state")
        submitter = await Submitter.begin(n, job)
        await submitter.adopt()
        await submitter.tell(FIRST, *(record for record, _ in states), END)
        await submitter.ask()
        journal = n.coordinator.standby.path(job.job)
        await until(lambda: not journal.parent.exists())
        assert not any(n.store.has(ref) for _, refs in states for ref in refs)
        assert n.store.has(job.tokenizer)


async def test_what_a_job_of_this_node_keeps_stays_whoever_ends(tmp_path: Path) -> None:
    """Also of one that only an earlier life coordinated."""
    async with standby(tmp_path) as n:
        job, states = signed(SURROGATE, n.store), put_states(n.store, b"state")
        records = [record for record, _ in states]
        leave_journal(tmp_path, records)
        submitter = await Submitter.begin(n, job)
        await submitter.adopt()
        await submitter.tell(FIRST, *records, END)
        await submitter.ask()
        await until(lambda: not n.coordinator.standby.path(job.job).parent.exists())
        kept = [all(map(n.store.has, refs)) for _, refs in states]
        assert kept == [False, False, True, True]


async def test_what_a_job_needs_that_is_not_restored_yet_stays(tmp_path: Path) -> None:
    """Another one replaces checkpoints that have the same pieces."""
    async with standby(tmp_path) as n:
        job, states = signed(SURROGATE, n.store), put_states(n.store, b"state")
        records = [record for record, _ in states]
        leave_journal(tmp_path, records[1:2])
        submitter = await Submitter.begin(n, job)
        await submitter.adopt()
        await submitter.tell(FIRST, *records)
        await submitter.ask()
        n.coordinator.retention.forget()
        kept = [all(map(n.store.has, refs)) for _, refs in states]
        assert kept == [False, True, True, True]


async def test_a_life_that_ends_with_its_job_leaves_the_rest_to_the_next_sweep(
    tmp_path: Path,
) -> None:
    async with standby(tmp_path) as n:
        states = put_states(n.store, b"state")
        journal = n.coordinator.standby.path(signed(SURROGATE, n.store).job)
        journal.parent.mkdir(parents=True)
        told = [FIRST, *(record for record, _ in states), END]
        journal.write_bytes(b"".join(map(_line, told)))
        await n.succession.sweep(time.time())
        assert not journal.parent.exists()
        assert not any(n.store.has(ref) for _, refs in states for ref in refs)


async def test_a_sweep_takes_what_is_old_and_nothing_of_a_job_that_is_worked_for(
    tmp_path: Path,
) -> None:
    async with standby(tmp_path) as n:
        lost, lives = (signed(SURROGATE, n.store, name=name) for name in ("lost", "lives"))
        states = put_states(n.store, b"state")
        for job in (lost, lives):
            submitter = await Submitter.begin(n, job)
            await submitter.adopt()
            await submitter.tell(FIRST, *(record for record, _ in states[:2]))
            await submitter.ask()
            if job is lost:
                (host,) = n.service.hosts()
                host.end()
                await n.logs("job left")
        folders = {job.job: _folders(n.folder, job) for job in (lost, lives)}
        now_s = time.time()
        for path in (p for pair in folders.values() for folder in pair for p in folder.rglob("*")):
            os.utime(path, (now_s, now_s))
        for sweep in (n.service.sweep, n.succession.sweep):
            await sweep(now_s + KEPT_S - 60)
        assert all(folder.exists() for pair in folders.values() for folder in pair)
        for sweep in (n.service.sweep, n.succession.sweep):
            await sweep(now_s + KEPT_S + 60)
        assert not any(folder.exists() for folder in folders[lost.job])
        assert all(folder.exists() for folder in folders[lives.job])
        assert all(n.store.has(ref) for _, refs in states[:2] for ref in refs), "both name them"
        assert [path.name for path in (n.folder / "jobs").iterdir()] == [lives.job]


def _folders(home: Path, job: Manifest) -> tuple[Path, Path]:
    """Where what was promised lies, and the journal."""
    return home / "jobs" / job.job, home / "led" / "standby" / job.job


async def test_sweeps_come_at_the_start_and_once_a_day_whatever_goes_wrong() -> None:
    clock_s, swept, logged = [1e9], list[float](), list[str]()

    async def sleep(seconds: float) -> None:
        clock_s[0] += seconds
        if len(swept) == 3:
            raise asyncio.CancelledError

    async def fails(_now_s: float) -> None:
        raise OSError("a broken disk")

    async def works(now_s: float) -> None:
        swept.append(now_s)

    def log(event: str, **facts: object) -> None:
        logged.append(f"{event}: {facts['reason']}")

    with pytest.raises(asyncio.CancelledError):
        await sweep_daily((fails, works), log, lambda: clock_s[0], sleep)
    assert swept == [1e9, 1e9 + SWEEP_S, 1e9 + 2 * SWEEP_S]
    assert logged == ["not swept: a broken disk"] * 3
