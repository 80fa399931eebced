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
    ("first", "second"),
    [
        ("before_log:6", "after_log:13"),  # before Ready
        ("mid_tensor:6", "after_commit:13"),  # before it is applied
        ("snapshot_write", "after_apply:13"),  # before Applied
    ],
)
def test_two_worker_children_die(
    trial: Trial, undisturbed: Outcome, first: str, second: str
) -> None:
    """One after the other, on two nodes: the second while the first one is being replaced."""
    trial.arm(2, first)
    trial.arm(1, second)
    outcome = trial.submit(f"child-{first[:8]}").outcome()
    assert trial.was_hit(2)
    assert trial.was_hit(1)
    assert outcome == undisturbed
    assert trial.fallen() == [], "every daemon outlives a child"


def test_a_node_dies_between_ready_and_commit(trial: Trial, undisturbed: Outcome) -> None:
    """Its Ready was counted, and it has not done what it was for; others have, or will."""
    trial.arm(1, "commit_received:9")
    job = trial.submit("between")
    until(lambda: trial.was_hit(1), "the node dies")
    until(lambda: len(trial.fallen()) == 1, "all of it")
    trial.heal()
    assert job.outcome() == undisturbed


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
    "places",
    [
        (
            "before_journal:2",  # the plan is on its way, and nobody knows yet that it has begun
            "after_journal:6",  # between Ready and Commit: nobody knows of it but the disk
            "commit_sent:5",  # one worker was told, the others were not
            "before_journal:20",  # all are ready, and no disk knows it
        ),
        (
            "before_CheckpointRecord",  # all of it is in the store, and no journal names it
            "before_StartedRecord",  # a majority agreed to a plan that nobody knows
            "after_CheckpointRecord",  # of a later step
            "after_StartedRecord",  # one disk knows the plan
        ),
        ("before_EvaluationRecord", "after_EvaluationRecord"),  # after the last step
    ],
    ids=lambda places: places[0],
)
def test_every_coordinator_dies_around_a_journal_write(
    trial: Trial, undisturbed: Outcome, places: tuple[str, ...]
) -> None:
    """Again and again, whoever it is by then; each is started again at once."""
    trial.arm_first(places[0])
    job = trial.submit(f"heads-{places[0].partition(':')[0]}", is_watched=False)
    for place, following in zip(places, [*places[1:], None], strict=True):
        until(lambda: trial.was_hit(0), f"a coordinator dies at {place}")
        until(lambda: len(trial.fallen()) == 1, "and all that it started")
        (victim,) = trial.fallen()
        if following is not None:
            trial.arm_first(following)
        trial.spawn([victim])
    until(trial.node(victim).is_ready, "it answers; others may have ended the job by then")
    assert job.outcome() == undisturbed
