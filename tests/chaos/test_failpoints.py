"""A process that dies at the worst places, one by one: nothing committed is lost."""

import pytest

from tests.chaos.trial import STEPS, Outcome, Trial, until

pytestmark = [pytest.mark.processes, pytest.mark.long, pytest.mark.timeout(240)]


def test_another_seed_is_told_from_the_oracle(trial: Trial, undisturbed: Outcome) -> None:
    other = trial.submit("other", seed=8).outcome()
    assert other.weights != undisturbed.weights
    assert other.losses != undisturbed.losses
    assert len(other.losses) == len(undisturbed.losses) == STEPS


@pytest.mark.parametrize(
    "place",
    [
        "before_log:6",
        "after_log:6",  # before Ready
        "mid_tensor:6",
        "after_commit:6",  # before it is applied
        "after_apply:6",  # before Applied
        "snapshot_write",
    ],
)
def test_a_worker_child_dies(trial: Trial, undisturbed: Outcome, place: str) -> None:
    trial.arm(2, place)
    outcome = trial.submit(f"child-{place[:8]}").outcome()
    assert trial.was_hit(2)
    assert outcome == undisturbed
    assert trial.fallen() == [], "every daemon outlives a child"


@pytest.mark.parametrize("place", ["joining", "seeding"])
def test_a_node_dies_while_a_state_moves(trial: Trial, undisturbed: Outcome, place: str) -> None:
    """One host of a stage is gone, so somebody new fetches it; that one dies, or who gives it."""
    job = trial.submit(place)
    view = job.reaches(3)
    victim = job.worker(view)
    others = [node.index for node in trial.swarm.nodes if node.index != victim]
    for index in others:
        trial.arm(index, place)
    trial.node(victim).kill()
    until(lambda: any(map(trial.was_hit, others)), f"somebody dies while {place}")
    until(lambda: len(trial.fallen()) >= 2, "the one who was hit is dead")
    trial.heal()
    assert job.outcome() == undisturbed


@pytest.mark.parametrize(
    "place",
    [
        "before_journal:8",
        "after_journal:8",  # between Ready and Commit: nobody knows of it but the disk
        "commit_sent:6",  # one worker was told, the others were not
    ],
)
def test_the_coordinator_dies_around_a_journal_write(
    trial: Trial, undisturbed: Outcome, place: str
) -> None:
    trial.arm(0, place)
    job = trial.submit(f"head-{place[:8]}", is_watched=False)
    until(lambda: trial.was_hit(0), "the coordinator dies")
    until(lambda: trial.fallen() == [0], "and all that it started")
    trial.start([0])
    assert job.outcome() == undisturbed
