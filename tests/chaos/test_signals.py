"""Nodes that are killed, stopped for a while, or asked to go: the result is the same."""

import json
from pathlib import Path

import pytest

from swarmnode.config import LOG_FILE
from swarmnode.coordinator.events import CommitRecord
from tests.chaos.trial import DIRECTORY, ENGINE, Outcome, Trial, suspend, until

pytestmark = [pytest.mark.processes, pytest.mark.long, pytest.mark.timeout(240)]


@pytest.mark.parametrize("module", ["", ENGINE, DIRECTORY])
def test_a_worker_is_killed(trial: Trial, undisturbed: Outcome, module: str) -> None:
    """Its whole node, for good, or only its torch child, or only its directory."""
    job = trial.submit("killed" + module.rpartition(".")[2])
    before = job.reaches(6)
    node = trial.node(job.worker(before))
    if module:
        assert node.kill_child(module)
    else:
        node.kill()
    if module != DIRECTORY:
        job.goes_on(before)
    assert job.outcome() == undisturbed
    assert trial.fallen() == ([] if module else [node.index])


def test_the_coordinators_node_is_killed_and_started_again(
    trial: Trial, undisturbed: Outcome
) -> None:
    job = trial.submit("restarted")
    job.reaches(6)
    trial.node(0).kill()
    trial.start([0])
    assert job.outcome() == undisturbed
    assert "Tick" not in causes(trial.node(0).home / LOG_FILE, job.name), "no link was broken"


def test_another_node_takes_over_and_the_old_coordinator_steps_down(
    trial: Trial, undisturbed: Outcome
) -> None:
    job = trial.submit("taken-over")
    before = job.reaches(6)
    trial.node(0).kill()
    old = [record for record in job.records() if isinstance(record, CommitRecord)]
    job.goes_on(before)
    assert job.node != 0
    job.until(lambda view: view.phase == "serving")
    new = [record for record in job.records() if isinstance(record, CommitRecord)]
    assert new[: len(old)] == old, "what was committed was not computed again"
    heir = trial.peers[job.node]
    trial.start([0])
    until(lambda: job.views()[0].phase == "handed over", "the old coordinator steps down")
    assert job.views()[0].reason == f"{heir} coordinates it now"
    assert job.outcome() == undisturbed


def test_a_node_that_slept_is_fenced(trial: Trial, undisturbed: Outcome) -> None:
    """It wakes up in the middle of a step that others have computed again without it."""
    job = trial.submit("slept")
    before = job.reaches(4)
    sleeper = trial.node(job.worker(before))
    processes = suspend(sleeper)
    try:
        after = job.goes_on(before)
        assert trial.peers[sleeper.index] not in {p for row in after.placement for p in row}
    finally:
        for process in processes:
            process.resume()
    until(sleeper.is_ready, "it is back")
    assert job.outcome() == undisturbed
    assert trial.fallen() == []


def test_a_node_that_is_asked_to_stop_hands_over_first(trial: Trial, undisturbed: Outcome) -> None:
    job = trial.submit("leaves")
    before = job.reaches(4)
    leaver = trial.node(job.worker(before))
    leaver.ask_to_stop()
    after = job.goes_on(before)
    assert leaver.wait_stopped(60) == 0, leaver.log_tail()
    assert trial.peers[leaver.index] not in {p for row in after.placement for p in row}
    view = job.until(lambda view: view.phase == "serving")
    assert (view.recoveries, view.killed_peers) == (0, ()), "nobody was lost"
    assert job.outcome() == undisturbed
    assert causes(trial.node(0).home / LOG_FILE, job.name) == {"PeersSeen", "Heard"}, (
        "after the beginning it was placed anew between two steps only: none is computed twice"
    )


def causes(log: Path, job: str) -> set[str]:
    """What made the coordinator ask for another generation."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    phases = [line for line in lines if line["event"] == "job" and line["job"] == job]
    return {line["cause"] for line in phases if line["phase"] == "placing"}
