"""Nodes that are killed, stopped for a while, or asked to go: the result is the same."""

import json
from typing import Any

import pytest

from swarmnode.cli.local_swarm import LocalNode
from swarmnode.config import DEPARTURE_FILE
from swarmnode.coordinator.events import CommitRecord
from swarmnode.coordinator.journal import read_journal
from tests.chaos.trial import Job, Outcome, Trial, committed, placings, suspend, until

pytestmark = [pytest.mark.processes, pytest.mark.long, pytest.mark.timeout(240)]


def test_worker_processes_are_killed(trial: Trial, undisturbed: Outcome) -> None:
    """A directory, of which the job takes no notice; what computes; another node, for good."""
    job = trial.submit("killed")
    before = job.reaches(3)
    first, second = (trial.node(index) for index in job.workers(before)[:2])
    assert first.kill_child("directory")
    view = job.reaches(before.step + 3)
    assert view.generation == before.generation
    assert first.kill_child("worker", view.job)
    view = job.goes_on(view)
    assert view.phase == "training", "the machine was too fast for the test"
    second.kill()
    job.goes_on(view)
    assert job.outcome() == undisturbed
    assert trial.fallen() == [second.index]


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


def test_a_coordinator_that_slept_changes_nothing(trial: Trial, undisturbed: Outcome) -> None:
    """Its daemon wakes up in the middle of a step, and finds its job in the hands of another one.

    What runs beside it goes on meanwhile: it is in the directory, and its child computes.
    """
    job = trial.submit("nodded-off")
    before = job.reaches(6)
    old = job.journal
    with trial.daemon_asleep(0):
        job.goes_on(before)
        assert job.node != 0
        heir = trial.peers[job.node]
    until(lambda: job.views()[0].phase == "handed over", "it steps down")
    assert job.views()[0].reason == f"{heir} coordinates it now"
    job.until(lambda view: view.phase == "serving")
    assert trial.peers[job.node] == heir
    late, new = committed(read_journal(old)[0]), committed(job.records())
    assert late == new[: len(late)], "of what it wrote last nothing differs"
    assert job.outcome() == undisturbed
    assert trial.fallen() == []


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


def departure(node: LocalNode) -> dict[str, Any]:
    """What a node that has left says of it."""
    left: dict[str, Any] = json.loads((node.home / DEPARTURE_FILE).read_text())
    return left


def assert_handed_over(left: dict[str, Any], job: Job) -> None:
    """It may have kept slots of another job: one that ended elsewhere while it slept."""
    given, kept = (
        [slot for slot in left[which] if slot.startswith(job.name)]
        for which in ("handed_over", "kept")
    )
    assert (len(given) > 0, kept, left["in_time"]) == (True, [], True)


def test_a_node_that_is_asked_to_stop_hands_over_first(trial: Trial, undisturbed: Outcome) -> None:
    job = trial.submit("leaves")
    before = job.reaches(4)
    leaver = trial.node(job.worker(before))
    leaver.ask_to_stop()
    after = job.goes_on(before)
    assert leaver.wait_stopped(60) == 0, leaver.log_tail()
    assert_handed_over(departure(leaver), job)
    assert trial.peers[leaver.index] not in {p for row in after.placement for p in row}
    view = job.until(lambda view: view.phase == "serving")
    assert (view.recoveries, view.killed_peers) == (0, ()), "nobody was lost"
    assert job.outcome() == undisturbed
    assert {line["cause"] for line in placings(trial.node(0), job.name)} == {
        "PeersSeen",
        "Heard",
    }, "after the beginning it was placed anew between two steps only: none is computed twice"


def test_the_coordinator_is_asked_to_stop_and_gives_its_place_away_too(
    trial: Trial, undisturbed: Outcome
) -> None:
    job = trial.submit("resigns")
    job.reaches(4)
    leaver = trial.node(0)
    leaver.ask_to_stop()
    assert leaver.wait_stopped(60) == 0, leaver.log_tail()
    left = departure(leaver)
    assert_handed_over(left, job)
    assert left["coordinated"] == [], "others have all its jobs"
    view = job.until(lambda view: view.phase == "serving")
    assert job.node != 0
    assert trial.peers[0] not in {p for row in view.placement for p in row}
    assert (view.recoveries, view.killed_peers) == (0, ()), "nobody was lost"
    assert job.outcome() == undisturbed
    assert trial.fallen() == [0]


def test_a_child_that_hangs_is_replaced_by_its_daemon(trial: Trial, undisturbed: Outcome) -> None:
    """Its node answers all the while, so nobody else finds out who holds the step up."""
    victim = trial.node(2)
    victim.kill()
    victim.variables["SWARMNODE_CHILD_HANG_S"] = "8"
    try:
        trial.heal()
        job = trial.submit("hangs")
        before = job.reaches(4)
        hung = victim.child("worker", before.job)
        assert hung is not None
        hung.suspend()
        view = job.goes_on(before)
        assert view.generation == before.generation + 1, "nothing else happened"
        assert not hung.is_running()
        assert job.outcome() == undisturbed
        assert trial.fallen() == [], "no daemon fell with it"
        said = [line["reason"] for line in placings(trial.node(0), job.name)]
        assert any("silent for" in reason for reason in said), said
    finally:
        del victim.variables["SWARMNODE_CHILD_HANG_S"]
        victim.kill()
