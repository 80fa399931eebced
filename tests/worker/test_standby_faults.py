"""What one job's papers, submitter or files may do to a node that stands by: nothing to others."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from standby_node import (
    FIRST,
    STARTED,
    StandbyNode,
    Submitter,
    byte_tokenizer,
    signed,
    standby,
)

from swarmnode.coordinator import succession
from swarmnode.coordinator.events import Record
from swarmnode.manifest import Manifest
from swarmnode.traces import TraceFile

SURROGATE = b'{"tokenizer.json": "\\ud800"}'
"""JSON, and a string of it that is no text."""


@pytest.fixture(autouse=True)
def _without_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(succession, "PATIENCE_S", 0.0)


async def orphan(node: StandbyNode, tokenizer: Any, *records: Record) -> Manifest:
    """A job of which this node is the first standby, and whose coordinator has hung up."""
    job = signed(tokenizer, node.store)
    submitter = await Submitter.begin(node, job)
    await submitter.adopt()
    await submitter.tell(FIRST, *records)
    await submitter.hang_up()
    return job


async def test_a_tokenizer_that_is_no_text_costs_its_own_job_and_no_daemon(tmp_path: Path) -> None:
    async with standby(tmp_path) as n:
        job = await orphan(n, SURROGATE)
        said = await n.logs("cannot take over")
        assert said["job"] == job.job
        assert "not text" in str(said["reason"])
    async with standby(tmp_path) as n:
        await n.restore()
        assert (await n.logs("cannot take over"))["job"] == job.job
        assert "not text" in str((await n.logs("job not restored"))["reason"])


async def test_a_tokenizer_at_which_the_library_panics_costs_its_own_job(tmp_path: Path) -> None:
    text = json.loads(byte_tokenizer(tmp_path)["tokenizer.json"])
    text["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": ""}
    async with standby(tmp_path) as n:
        await orphan(n, {"tokenizer.json": json.dumps(text)})
        assert "not a tokenizer" in str((await n.logs("cannot take over"))["reason"])


async def test_a_journal_that_cannot_be_read_is_its_own_jobs_trouble(tmp_path: Path) -> None:
    async with standby(tmp_path) as n:
        job = await orphan(n, SURROGATE)
        await n.logs("cannot take over")
        journal = n.coordinator.standby.path(job.job)
    journal.unlink()
    journal.mkdir()
    async with standby(tmp_path) as n:
        await n.service.restore()
        said = await n.logs("cannot take over")
        assert (said["job"], "Is a directory" in str(said["reason"])) == (job.job, True)


async def test_a_damaged_promise_does_not_keep_the_other_jobs_from_going_on(tmp_path: Path) -> None:
    async with standby(tmp_path) as n:
        job = await orphan(n, SURROGATE)
        await n.logs("cannot take over")
    (tmp_path / "jobs" / "0").mkdir()
    (tmp_path / "jobs" / "0" / "tenancy.json").write_bytes(b"{")
    async with standby(tmp_path) as n:
        await n.service.restore()
        assert (await n.logs("job not taken up"))["job"] == "0"
        assert (await n.logs("cannot take over"))["job"] == job.job


async def test_a_saved_job_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "led" / "0").mkdir(parents=True)
    (tmp_path / "led" / "0" / "job.json").write_text("[" * 100_000)
    async with standby(tmp_path) as n:
        await n.restore()
        assert "recursion" in str((await n.logs("job not restored"))["reason"])


async def test_figures_that_cannot_be_shown_end_only_their_job(tmp_path: Path) -> None:
    async with standby(tmp_path) as n:
        job = await orphan(n, byte_tokenizer(tmp_path), replace(STARTED, step=10**400))
        assert (await n.logs("job gave up"))["job"] == job.job
        assert "too large" in str((await n.logs("job not shown"))["reason"])


def test_a_trace_that_finds_no_room_goes_without_a_line() -> None:
    file = TraceFile(Path("/dev/full"))
    file.span("send", 0.0, 1.0)
    file.span("send", 1.0, 2.0)
    file.close()
