"""A bit has flipped inside the journal that a coordinator left: nobody goes on from what is before
it, and whoever has the whole of it takes the job over."""

from pathlib import Path

import pytest
from standby_node import (
    FIRST,
    ME,
    STARTED,
    Submitter,
    byte_tokenizer,
    signed,
    standby,
    until,
)

from swarmnode.coordinator import succession
from swarmnode.coordinator.events import EvaluationRecord
from swarmnode.coordinator.job_files import JobFiles
from swarmnode.coordinator.journal import _line, read_journal
from swarmnode.errors import NotFoundError
from swarmnode.manifest import Manifest
from swarmnode.p2p.blob_store import BlobStore
from tests.coordinator.bench import FACTS

TOLD = [FIRST, STARTED, EvaluationRecord(1, 5.25), EvaluationRecord(2, 5.0)]
DAMAGED = b"".join(map(_line, TOLD)).replace(b"5.25", b"5.26")


@pytest.fixture(autouse=True)
def _without_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(succession, "PATIENCE_S", 0.0)


def leave_damaged(job: Manifest, folder: Path) -> Path:
    """What an earlier life of the node, which coordinated the job, has left; its journal."""
    files = JobFiles(folder / "led" / job.job, job, b"", FACTS)
    files.directory.mkdir(parents=True)
    files.write()
    journal = files.directory / "journal"
    journal.write_bytes(DAMAGED)
    return journal


async def test_a_job_with_a_damaged_journal_does_not_go_back_but_says_which_line(
    tmp_path: Path,
) -> None:
    job = signed(byte_tokenizer(tmp_path), BlobStore(tmp_path / "blobs"))
    journal = leave_damaged(job, tmp_path)
    for _ in range(2):  # however often the node is started
        async with standby(tmp_path) as n:
            await n.restore()
            assert f"line 3 of {journal} is damaged" in str(
                (await n.logs("job not restored"))["reason"]
            )
            assert n.coordinator.jobs == ()
            assert await n.coordinator.num_lines(job.job) == 0
            with pytest.raises(NotFoundError, match=f"was not restored: line 3 of {journal}"):
                n.coordinator.find(job.job)
        assert journal.read_bytes() == DAMAGED


async def test_who_is_told_the_journal_anew_takes_over_with_all_of_it(tmp_path: Path) -> None:
    job = signed(byte_tokenizer(tmp_path), BlobStore(tmp_path / "blobs"))
    journal = leave_damaged(job, tmp_path)
    async with standby(tmp_path) as n:
        await n.restore()
        submitter = await Submitter.begin(n, job)
        await submitter.adopt()
        await submitter.tell(*TOLD)
        await submitter.hang_up()
        await until(lambda: bool(n.coordinator.jobs))
        assert n.coordinator.find(job.job).ledger.me == ME.peer
        assert read_journal(journal)[0][: len(TOLD)] == TOLD
    assert journal.with_name("journal.damaged-1").read_bytes() == DAMAGED
