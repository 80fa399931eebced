"""The scenarios of volunteers who come and go, cut down to what a test has time for."""

import pytest

from swarmnode.coordinator.events import CommitRecord
from swarmnode.coordinator.votes import Votes
from swarmnode.domain import Generation, PeerId, Plan
from swarmnode.simulation.outcome import run_seed
from swarmnode.simulation.scenario import Scenario, load_scenario
from swarmnode.simulation.statistics import JobStatistics
from tests.simulation.scenarios import CALM, EXAMPLES


def hour_of_day() -> Scenario:
    """An hour in which sixty machines come and go as a thousand do in a day."""
    day = load_scenario(EXAMPLES / "day.toml")
    assert day.availability is not None
    swarm = day.swarm.model_copy(update={"nodes": (60, 60)})
    availability = day.availability.model_copy(update={"session_h": 1.0, "away_h": 0.5})
    update = {"duration_s": 3600.0, "swarm": swarm, "availability": availability}
    return day.model_copy(update=update)


def test_jobs_go_on_through_an_hour_of_the_day_and_their_coordinators_go_too() -> None:
    outcomes = [run_seed(hour_of_day(), seed) for seed in range(2)]
    assert [outcome.violation for outcome in outcomes] == ["", ""]
    assert sum(job.takeovers for outcome in outcomes for job in outcome.jobs) > 0
    for outcome in outcomes:
        for job in outcome.jobs:
            assert job.goodput is not None
            # Sixteen such hours had 0.30 to 0.60 (large) and 0.79 to 1.02 (small).
            assert 0.2 < job.goodput < 1.1


def test_the_evening_trains_for_a_quarter_of_it() -> None:
    evening = load_scenario(EXAMPLES / "evening.toml")
    outcome = run_seed(evening.model_copy(update={"duration_s": 3600.0}), 0)
    assert outcome.violation == ""
    assert outcome.jobs[0].steps > 10


@pytest.mark.parametrize("num_nodes", [4, 1])
def test_a_job_that_stands_still_is_told_if_machines_enough_are_there(
    num_nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One machine has no room for the job: it waits, and rightly."""
    monkeypatch.setattr(Votes, "is_complete", lambda *_: False)
    swarm = CALM.swarm.model_copy(update={"nodes": (num_nodes, num_nodes)})
    still = CALM.model_copy(update={"duration_s": 500.0, "stall_s": 300.0, "swarm": swarm})
    told = run_seed(still, 0).violation
    assert ("nothing was committed for 5" in told) == (num_nodes == 4), told
    monkeypatch.undo()
    assert run_seed(still, 0).violation == ""


def test_goodput_counts_the_time_since_the_last_commit_of_a_job_that_is_not_done() -> None:
    plan = Plan(Generation(1), ((0, 1),), ((PeerId("a"),),), PeerId("a"))
    job = JobStatistics()
    job.begun(plan, 0.0)
    for step in range(3):
        job.committed(CommitRecord(Generation(1), step, 1.0, 1.0, ()), 10.0 * step + 10.0)
    assert job.goodput(120.0, is_done=True) == 1.0
    assert job.goodput(120.0, is_done=False) == 0.25
    assert job.open_hits(120.0) == []


def test_a_hit_without_a_recovery_is_open_until_there_is_one() -> None:
    plans = [Plan(Generation(n), ((0, 1),), ((PeerId("a"),),), PeerId("a")) for n in (1, 2)]
    job = JobStatistics()
    job.begun(plans[0], 0.0)
    job.hit("a", "kill", 20.0)
    job.begun(plans[1], 40.0)
    assert (job.recoveries, job.open_hits(50.0)) == ([], [("kill", 30.0)])
    job.committed(CommitRecord(Generation(2), 0, 1.0, 1.0, ()), 55.0)
    assert (job.recoveries, job.open_hits(60.0)) == ([("kill", 35.0)], [])
