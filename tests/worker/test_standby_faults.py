"""What one job's papers, submitter or files may do to a node that stands by: nothing to others."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from standby_node import (
    ADOPTED,
    FIRST,
    STARTED,
    StandbyNode,
    Submitter,
    byte_tokenizer,
    signed,
    standby,
    until,
)

from swarmnode.coordinator import succession
from swarmnode.coordinator.events import CheckpointRecord, EvaluationRecord, Record
from swarmnode.coordinator.journal import Journal, _line
from swarmnode.domain import BlobRef, Generation, JobId, PeerId
from swarmnode.manifest import Manifest
from swarmnode.p2p.blob_store import BlobStore, blob_path
from swarmnode.p2p.states import IndexedTensor, TensorIndex
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


async def test_a_tokenizer_at_which_the_library_panics_costs_its_own_job(tmp_path: Path) -> None:
    text = json.loads(byte_tokenizer(tmp_path)["tokenizer.json"])
    text["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": ""}
    async with standby(tmp_path) as n:
        await orphan(n, {"tokenizer.json": json.dumps(text)})
        assert "not a tokenizer" in str((await n.logs("cannot take over"))["reason"])


async def test_a_tokenizer_at_which_the_library_aborts_ends_no_daemon(tmp_path: Path) -> None:
    text = json.loads(byte_tokenizer(tmp_path)["tokenizer.json"])
    text["model"] = {
        "type": "BPE", "vocab": {"a": 0, "\u00e9": 1, "a\u00e9": 2}, "merges": ["a \u00e9"],
        "dropout": None, "unk_token": None, "continuing_subword_prefix": "x",
        "end_of_word_suffix": None, "fuse_unk": False,
    }  # fmt: skip
    async with standby(tmp_path) as n:
        job = await orphan(n, {"tokenizer.json": json.dumps(text)})
        assert "cannot be loaded" in str((await n.logs("cannot take over"))["reason"])
        assert not (tmp_path / "led" / job.job / "job.json").exists(), "no later life tries it"


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
        assert (await n.logs("papers not readable"))["job"] == "0"
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


# ---- references to no content ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sha256", "num_bytes"),
    [("x", 1), ("A" * 64, 1), ("a" * 64 + "\n", 1), ("a" * 64, -1), ("a" * 64, 10**9),
     ("../" * 22, 1), ("a" * 64, True)],
)  # fmt: skip
async def test_a_line_that_names_no_content_is_not_kept(
    tmp_path: Path, sha256: str, num_bytes: int
) -> None:
    line = _line(CheckpointRecord(2, (BlobRef(sha256, num_bytes),)))
    async with standby(tmp_path) as n:
        job = signed(SURROGATE, n.store)
        submitter = await Submitter.begin(n, job)
        await submitter.tell(FIRST)
        await submitter.tell_lines(line)
        await submitter.tell_lines(line)
        await submitter.adopt()
        assert n.coordinator.standby.num_lines(job.job) == 1
        n.coordinator.retention.forget()
        assert n.coordinator.standby.checkpoints() == {job.job: []}
        assert [event for event, _ in n.logged] == ["job taken"]


def put_states(store: BlobStore, name: bytes) -> list[tuple[CheckpointRecord, set[BlobRef]]]:
    """Checkpoints of one job, and what each consists of."""
    states = []
    for step in range(4):
        chunk = store.put(name + b"%d" % step)
        tensor = IndexedTensor("w", "U8", (chunk.num_bytes,), (chunk,))
        index = store.put(TensorIndex(step, (tensor,)).to_json())
        states.append((CheckpointRecord(step, (index,)), {index, chunk}))
    return states


async def test_one_standby_journal_does_not_keep_the_chunks_of_the_others(tmp_path: Path) -> None:
    async with standby(tmp_path) as n:
        states = put_states(n.store, b"state")
        submitter = await Submitter.begin(n, signed(SURROGATE, n.store))
        await submitter.adopt(replace(ADOPTED, voters=ADOPTED.voters[:1]))
        await submitter.tell(FIRST, *(record for record, _ in states))
        await submitter.adopt(replace(ADOPTED, generation=Generation(2)))
        n.coordinator.standby.path(JobId("0")).mkdir(parents=True)
        n.coordinator.retention.forget()
        kept = [all(map(n.store.has, refs)) for _, refs in states]
        assert kept == [False, False, True, True]
        assert [event for event, _ in n.logged] == ["job taken"]


async def test_a_chunk_that_cannot_be_deleted_stops_nobody(tmp_path: Path) -> None:
    async with standby(tmp_path) as n:
        states = put_states(n.store, b"state")
        submitter = await Submitter.begin(n, signed(SURROGATE, n.store))
        await submitter.tell(FIRST, *(record for record, _ in states))
        await submitter.adopt()
        path = blob_path(n.store.root, states[0][0].indexes[0])
        path.unlink()
        (path / "in the way").mkdir(parents=True)
        n.coordinator.retention.forget()
        assert "directory" in str((await n.logs("old chunks stay"))["reason"]).lower()


# ---- how much a stranger may leave -------------------------------------------------------------


def lines_of(num_bytes: int) -> bytes:
    """About so many bytes of journal."""
    line = _line(EvaluationRecord(1, 1.0, "x" * 10_000))
    return line * (num_bytes // len(line))


async def test_what_comes_before_a_plan_is_bounded_for_all_jobs_together_and_goes_with_its_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(succession, "MAX_EARLY_BYTES", 1 << 20)
    piece = lines_of(400_000)
    async with standby(tmp_path) as n:
        journals = n.coordinator.standby
        jobs = [signed(SURROGATE, n.store, name=name) for name in ("one", "two")]
        for job, kept in zip(jobs, (2, 0), strict=True):
            submitter = await Submitter.begin(n, job)
            for _ in range(3):
                await submitter.tell_lines(piece, piece.count(b"\n"))
            await submitter.ask()
            assert journals.num_lines(job.job) == kept * piece.count(b"\n")
            if job is jobs[0]:
                stranger = submitter
        await stranger.hang_up()
        await n.logs("job left")
        assert not journals.path(jobs[0].job).parent.exists()
        again = await Submitter.begin(n, jobs[0], generation=2)
        await again.tell_lines(piece, piece.count(b"\n"))
        await again.release()
        await until(lambda: [e for e, _ in n.logged].count("job left") == 2)
        assert not journals.path(jobs[0].job).parent.exists()


async def test_a_newcomer_takes_a_long_journal_before_its_first_plan(tmp_path: Path) -> None:
    piece = lines_of(500_000)
    async with standby(tmp_path) as n:
        job = signed(SURROGATE, n.store)
        submitter = await Submitter.begin(n, job)
        for _ in range(40):  # as of a job of a million steps
            await submitter.tell_lines(piece, piece.count(b"\n"))
        await submitter.adopt()
        assert n.coordinator.standby.num_lines(job.job) == 40 * piece.count(b"\n")
        await submitter.hang_up()
        await n.logs("stands for election")
        assert n.coordinator.standby.num_lines(job.job) == 40 * piece.count(b"\n")


async def test_a_journal_has_a_largest_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmnode.coordinator.standby.MAX_JOURNAL_BYTES", 1 << 20)
    piece = lines_of(400_000)
    async with standby(tmp_path) as n:
        job = signed(SURROGATE, n.store)
        submitter = await Submitter.begin(n, job)
        await submitter.adopt()
        for _ in range(5):
            await submitter.tell_lines(piece, piece.count(b"\n"))
        await submitter.ask()
        assert n.coordinator.standby.num_lines(job.job) == 2 * piece.count(b"\n")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a file that is written slowly")
async def test_a_disk_that_is_slow_with_a_journal_holds_up_nobody_else(
    tmp_path: Path,
) -> None:
    async with standby(tmp_path) as n:
        slow, other = (signed(SURROGATE, n.store, name=name) for name in ("slow", "other"))
        submitter = await Submitter.begin(n, slow)
        await submitter.adopt()
        await submitter.tell(FIRST)
        await submitter.ask()
        journal = n.coordinator.standby.path(slow.job)
        journal.unlink()
        os.mkfifo(journal)  # whoever writes to it waits for a reader
        await submitter.tell(STARTED)
        for generation in (1, 2, 3):
            await Submitter.begin(n, other, generation)
        reader = os.open(journal, os.O_RDONLY | os.O_NONBLOCK)
        await submitter.ask()
        assert len(os.read(reader, 1 << 16).splitlines()) == 1, "it was on its way all the while"
        os.close(reader)


async def test_who_gave_way_to_a_candidate_that_never_came_stands_again(tmp_path: Path) -> None:
    async with standby(tmp_path) as n:
        job = signed(byte_tokenizer(tmp_path), n.store)
        submitter = await Submitter.begin(n, job)
        await submitter.adopt()
        await submitter.tell(FIRST, STARTED)
        await submitter.ask()
        n.succession.handed_over(job.job)
        assert not n.succession._waiting, "somebody talks to us: his end will tell"
    async with standby(tmp_path) as n:
        n.succession.handed_over(job.job)
        assert (await n.logs("stands for election"))["job"] == job.job
    assert [succession.vain_s(number) for number in (1, 2, 3, 9, 99)] == [4, 8, 16, 600, 600]


async def test_what_a_former_standby_has_goes_once_newer_checkpoints_are_elsewhere(
    tmp_path: Path,
) -> None:
    first, me = ADOPTED.voters
    async with standby(tmp_path) as n:
        states = put_states(n.store, b"state")
        submitter = await Submitter.begin(n, signed(SURROGATE, n.store))
        await submitter.adopt(replace(ADOPTED, voters=(first, PeerId("x"), PeerId("y"), me)))
        await submitter.tell(FIRST, *(record for record, _ in states[:2]))
        await submitter.ask()
        assert all(map(n.store.has, states[0][1] | states[1][1])), "the newest two"
        newer = put_states(BlobStore(tmp_path / "elsewhere"), b"newer")
        await submitter.tell(*(record for record, _ in newer[:2]))
        await until(lambda: not any(map(n.store.has, states[0][1] | states[1][1])))


async def test_a_former_coordinator_keeps_what_its_successor_keeps(tmp_path: Path) -> None:
    async with standby(tmp_path) as n:
        states = put_states(n.store, b"state")
        job = signed(SURROGATE, n.store)
        folder = n.folder / "led" / job.job
        folder.mkdir(parents=True)
        left = Journal(folder / "journal")
        for record, _ in states[:2]:
            left.append(record)
        left.close()
        submitter = await Submitter.begin(n, job)
        await submitter.tell(FIRST, *(record for record, _ in states[2:]))
        await submitter.adopt(replace(ADOPTED, voters=ADOPTED.voters[:1]))
        n.coordinator.retention.forget()
        kept = [all(map(n.store.has, refs)) for _, refs in states]
        assert kept == [False, False, True, True]
