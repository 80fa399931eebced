"""Disks that are full, lie, or were torn: what was committed is found elsewhere."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarmnode.coordinator.events import CommitRecord
from swarmnode.coordinator.journal import read_journal
from swarmnode.http.api import JobView
from swarmnode.tensorfiles import read_header
from tests.chaos.trial import (
    EVERY,
    STEPS,
    Job,
    Outcome,
    Trial,
    committed,
    placings,
    suspend,
    until,
)
from tests.tmpfs import fill, tmpfs

pytestmark = [pytest.mark.processes, pytest.mark.long, pytest.mark.timeout(240)]
SMALL = "64m"


@contextlib.contextmanager
def small_disk(home: Path) -> Iterator[None]:
    """Put the home of a node that is down on a disk of its own, with all that is in it."""
    copy = home.with_name(home.name + ".copy")
    shutil.copytree(home, copy)
    with tmpfs(home, SMALL, is_lazy=True):
        shutil.copytree(copy, home, dirs_exist_ok=True)
        home.chmod(0o700)
        yield


def test_a_full_disk_costs_nothing_but_its_node(trial: Trial, undisturbed: Outcome) -> None:
    node = trial.node(3)
    node.ask_to_stop()
    assert node.wait_stopped(15) == 0, node.log_tail()
    with small_disk(node.home):
        trial.heal()
        job = trial.submit("full")
        before = job.reaches(4)
        fill(node.home)
        after = job.goes_on(before)
        assert trial.peers[3] not in {peer for row in after.placement for peer in row}
        assert job.outcome() == undisturbed
        assert trial.fallen() == [], node.last_words()
        said = [view["reason"] for view in placings(trial.node(0), job.name)]
        assert any("No space left" in reason for reason in said), said
        node.kill()


def test_a_full_disk_of_the_coordinator_costs_nothing_and_heals_by_itself(
    trial: Trial, undisturbed: Outcome
) -> None:
    """Another voter goes on meanwhile; with room again the first finds that out, not restarted."""
    node = trial.node(0)
    node.ask_to_stop()
    assert node.wait_stopped(15) == 0, node.log_tail()
    with small_disk(node.home):
        trial.heal()
        pid = node.client.node().pids["daemon"]
        job = trial.submit("cramped")
        before = job.reaches(4)
        ballast = fill(node.home)
        stuck = job.until(lambda view: view.phase == "waiting" and "room" in view.reason)
        assert "No space left on device" in stuck.reason
        assert stuck.step < STEPS
        until(lambda: bool(ahead(job, before)), "somebody else goes on")
        assert node.client.job(job.name).phase == "waiting"
        ballast.unlink()
        until(lambda: node.client.job(job.name).phase == "handed over", "it learns of the other")
        assert node.client.node().pids["daemon"] == pid
        assert job.outcome() == undisturbed
        assert trial.fallen() == [], node.last_words()
        node.kill()


def ahead(job: Job, since: JobView) -> list[int]:
    """Nodes but the first that coordinate the job and have committed more than it had."""
    views = job.views()
    return [
        at
        for at, view in views.items()
        if at != 0 and view.generation > since.generation and view.step > since.step
    ]


def flip(path: Path, at: int) -> None:
    """Invert one bit of a file."""
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def test_flipped_bits_on_both_disks_of_a_stage_are_noticed(
    trial: Trial, undisturbed: Outcome
) -> None:
    """Both holders of a stage die; both newest snapshots and one of the logs are damaged."""
    job = trial.submit("flipped")
    view = job.reaches(EVERY + 4)
    (stage,) = [at for at, hosts in enumerate(job.hosts(view)) if 0 not in hosts]
    holders = sorted(job.hosts(view)[stage])
    for index in holders:
        suspend(trial.node(index))  # both at once: nothing is handed over between two deaths
    for index in holders:
        trial.node(index).kill()
    for index in holders:
        folder = trial.node(index).home / "hosted" / job.name / f"stage-{stage}"
        newest = max(folder.glob("*.safetensors"), key=lambda path: int(path.name.split(".")[0]))
        for _, weights in sorted(read_header(newest).items())[:1]:
            flip(newest, weights.offset + weights.num_bytes // 2)
    updates = sorted(folder.glob("*.update"), key=lambda path: int(path.stem))
    assert len(updates) >= 2
    flip(updates[-2], updates[-2].stat().st_size // 2)
    trial.start(holders)
    assert job.outcome() == undisturbed


def test_a_torn_journal_is_made_whole_by_the_others(trial: Trial, undisturbed: Outcome) -> None:
    job = trial.submit("torn")
    job.reaches(3)
    trial.node(0).kill()
    whole = job.records()
    last = max(at for at, record in enumerate(whole) if isinstance(record, CommitRecord))
    lines = job.journal.read_bytes().splitlines(keepends=True)
    os.truncate(job.journal, len(b"".join(lines[: last + 1])) - 7)
    assert read_journal(job.journal)[0] == whole[:last]
    trial.start([0])
    outcome = job.outcome()
    # Whoever was told of the torn line has it; if nobody was, the same step is committed again.
    assert committed(job.records())[: len(committed(whole))] == committed(whole)
    assert outcome == undisturbed
    causes = {line["cause"] for line in placings(trial.node(0), job.name)}
    assert "Tick" not in causes, "no link was broken"
