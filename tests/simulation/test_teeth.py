"""The invariants bite: with one safeguard taken out of the real machines, a few seeds show it."""

from collections.abc import Sequence, Set
from dataclasses import replace

import pytest

from swarmnode.coordinator import events as on
from swarmnode.coordinator import forming
from swarmnode.coordinator.inquiry import Inquiry
from swarmnode.coordinator.job_state import JobState
from swarmnode.coordinator.ledger import Ledger
from swarmnode.coordinator.votes import Votes
from swarmnode.domain import PeerId, Plan, SlotId
from swarmnode.engine_messages import Base
from swarmnode.fields import Losses
from swarmnode.messages import (
    Assign,
    Commit,
    Frame,
    Inquire,
    Ready,
)
from swarmnode.simulation.child import Child
from swarmnode.simulation.computing import StageState, ToyReduction
from swarmnode.simulation.daemon import Daemon
from swarmnode.simulation.outcome import run_seed
from swarmnode.simulation.scenario import FaultSection, Scenario
from swarmnode.worker.engine.ports import Payload
from swarmnode.worker.engine.steps import Steps, _Run
from swarmnode.worker.tenancy import Tenancy
from tests.simulation.scenarios import FAULTS, PEACE, first_violation

MOST_SEEDS = 200
CLOCKS = Scenario(
    name="clocks",
    swarm=FAULTS.swarm,
    jobs=(FAULTS.jobs[0].model_copy(update={"steps": 40}),),
    faults=FaultSection(kinds=("clock", "clock", "kill", "partition"), every_s=2.0, most_wiped=1),
)
"""A job that takes long enough for several jumps at its coordinator."""
RESTARTS = Scenario(
    name="restarts",
    swarm=FAULTS.swarm.model_copy(update={"nodes": (3, 4), "load_s": (0.1, 0.1, 30.0)}),
    jobs=(FAULTS.jobs[0].model_copy(update={"steps": 80}),),
    faults=FaultSection(kinds=("power", "kill", "power"), every_s=2.5, last_s=150.0, most_wiped=0),
)
"""Often all holders of a stage are started again at once, and read what is on their disks."""


def assert_shows(
    violation: str, monkeypatch: pytest.MonkeyPatch, scenario: Scenario = FAULTS
) -> None:
    """With the safeguard taken out, some seed shows this violation; with it, the seed is fine."""
    found = first_violation(scenario, MOST_SEEDS, violation)
    monkeypatch.undo()
    assert found is not None
    assert run_seed(scenario, found.seed).violation == ""


@pytest.mark.parametrize("violation", ["has begun already", "after it promised"])
def test_fencing(violation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promises are given to everybody and never looked at."""

    def grant(
        self: Tenancy, inquire: Inquire, sender: PeerId, _live: bool, _lines: int = 0
    ) -> Tenancy:
        return replace(self, promised=inquire.generation, promised_to=sender)

    def adopt(self: Tenancy, assign: Assign, sender: PeerId) -> Tenancy:
        return replace(self, promised=assign.plan.generation, promised_to=sender, plan=assign.plan)

    monkeypatch.setattr(Tenancy, "accepts", lambda *_: True)
    monkeypatch.setattr(Tenancy, "obeys", lambda *_: True)
    monkeypatch.setattr(Tenancy, "on_inquire", grant)
    monkeypatch.setattr(Tenancy, "on_assign", adopt)
    assert_shows(violation, monkeypatch)


def test_nobody_hears_who_reads_its_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Inquiry, "checking", lambda *_: None)
    assert_shows("goes back to step", monkeypatch, RESTARTS)


def test_a_lost_stage_is_looked_for_too_shortly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder's disk comes back, but the job is at its last checkpoint by then."""
    monkeypatch.setattr(forming, "SEARCH_S", 2.0)
    assert_shows("goes back to step", monkeypatch)


def test_nobody_hears_who_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "_on_leaving", lambda *_: [])
    assert first_violation(PEACE, 5, "wants to leave and is not let go") is not None


def test_the_log_is_replayed_without_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Child._replay

    def skip_first(self: Child, state: StageState, base: Base) -> None:
        if base.replays and base.replays[0].step == state.step:
            state.step += 1
        real(self, state, base)

    monkeypatch.setattr(Child, "_replay", skip_first)
    assert_shows("another state of stage", monkeypatch)


def test_the_journal_is_read_without_its_last_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    real = JobState.restore

    def forget(self: JobState, records: Sequence[on.Record]) -> None:
        commits = [i for i, record in enumerate(records) if isinstance(record, on.CommitRecord)]
        last = commits[-1] if commits else -1
        real(self, [record for i, record in enumerate(records) if i != last])

    monkeypatch.setattr(JobState, "restore", forget)
    assert_shows("takes up its journal at step", monkeypatch)


def test_half_of_the_voters_are_enough_for_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for the first of them alone: two coordinators may each have half."""

    def is_enough(self: Inquiry, group: Sequence[PeerId], agreed: Set[PeerId]) -> bool:
        count = sum(voter in agreed - self._forgetful for voter in group)
        return 2 * count >= len(group)

    monkeypatch.setattr(Inquiry, "_is_enough", is_enough)
    assert_shows("has begun already", monkeypatch)


def test_a_ready_that_comes_twice_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of one holder of a stage for that of another one, who has not got the update yet."""
    real = Votes.add

    def count(self: Votes, ready: Ready) -> None:
        self.__dict__["num_heard"] = self.__dict__.get("num_heard", 0) + 1
        real(self, ready)

    def is_complete(self: Votes, plan: Plan) -> bool:
        heard: int = self.__dict__.get("num_heard", 0)
        stages = range(plan.num_stages)
        has_all_stages = {slot.stage for slot in self._ready} == {*stages}
        return has_all_stages and heard >= sum(len(plan.holders(stage)) for stage in stages)

    def clear(self: Votes) -> None:
        self.__dict__["num_heard"] = 0
        self._ready.clear()

    monkeypatch.setattr(Votes, "add", count)
    monkeypatch.setattr(Votes, "is_complete", is_complete)
    monkeypatch.setattr(Votes, "clear", clear)
    assert_shows("have its update", monkeypatch)


def test_a_microbatch_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ToyReduction.share

    def share(self: ToyReduction, slot: SlotId, losses: Losses) -> None:
        if self._step == 3 and slot == SlotId(1, 1):
            self._gradients(slot).counts[1] += 1
        real(self, slot, losses)

    monkeypatch.setattr(ToyReduction, "share", share)
    assert_shows("microbatches count [1, 2, 1, 1] times", monkeypatch)


def test_frames_that_come_again_are_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The schedule itself notices: what would count twice has arrived before."""

    def accept(self: Steps, frame: Frame, payload: Payload) -> None:
        run: _Run = self._run(frame.step, frame.evaluate)
        if run.pipeline is None:
            run.early.append((frame, payload))
        else:
            self._deliver(run, frame, payload)

    monkeypatch.setattr(Steps, "_accept", accept)
    assert_shows("AssertionError in SlotSchedule.arrived", monkeypatch)


def test_patience_goes_by_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def wall_s(self: Daemon) -> float:
        return self.swarm.directory.wall_s(self.machine)

    monkeypatch.setattr(Daemon, "monotonic_s", property(wall_s))
    assert_shows("not done", monkeypatch, CLOCKS)


def test_commits_are_told_before_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Ledger.handle

    def hasty(self: Ledger, event: on.Event, now_s: float) -> list[on.Effect]:
        effects = real(self, event, now_s)
        told = [e for e in effects if isinstance(e, on.Send) and isinstance(e.message, Commit)]
        return told + [effect for effect in effects if effect not in told]

    monkeypatch.setattr(Ledger, "handle", hasty)
    assert_shows("before it is in its journal", monkeypatch)
