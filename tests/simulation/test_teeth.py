"""The invariants bite: with one safeguard taken out of the real machines, a few seeds show it."""

from collections.abc import Sequence, Set
from dataclasses import replace

import pytest

from swarmnode.coordinator import events as on
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


def shown(monkeypatch: pytest.MonkeyPatch, scenario: Scenario = FAULTS) -> str:
    """What the first seed shows with the safeguard taken out; with it, the same seed is fine."""
    found = first_violation(scenario, MOST_SEEDS)
    monkeypatch.undo()
    assert found is not None
    assert run_seed(scenario, found.seed).violation == ""
    return found.violation


def test_fencing(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert shown(monkeypatch)


def test_nobody_hears_who_reads_its_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Inquiry, "checking", lambda *_: None)
    assert "goes back to step" in shown(monkeypatch, RESTARTS)


def test_nobody_hears_who_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "_on_leaving", lambda *_: [])
    found = first_violation(PEACE, 5)
    assert found is not None
    assert "wants to leave and is not let go" in found.violation


def test_the_log_is_replayed_without_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Child._replay

    def skip_first(self: Child, state: StageState, base: Base) -> None:
        if base.replays and base.replays[0].step == state.step:
            state.step += 1
        real(self, state, base)

    monkeypatch.setattr(Child, "_replay", skip_first)
    assert "another state of stage" in shown(monkeypatch)


def test_the_journal_is_read_without_its_last_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    real = JobState.restore

    def forget(self: JobState, records: Sequence[on.Record]) -> None:
        commits = [i for i, record in enumerate(records) if isinstance(record, on.CommitRecord)]
        last = commits[-1] if commits else -1
        real(self, [record for i, record in enumerate(records) if i != last])

    monkeypatch.setattr(JobState, "restore", forget)
    assert shown(monkeypatch)


def test_half_of_the_voters_are_enough_for_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for the first of them alone: two coordinators may each have half."""

    def is_enough(self: Inquiry, group: Sequence[PeerId], agreed: Set[PeerId]) -> bool:
        count = sum(voter in agreed - self._forgetful for voter in group)
        return 2 * count >= len(group)

    monkeypatch.setattr(Inquiry, "_is_enough", is_enough)
    assert shown(monkeypatch)


def test_a_ready_that_comes_twice_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Votes.add

    def count(self: Votes, ready: Ready) -> None:
        self.__dict__["num_heard"] = self.__dict__.get("num_heard", 0) + 1
        real(self, ready)

    def is_complete(self: Votes, plan: Plan) -> bool:
        heard: int = self.__dict__.get("num_heard", 0)
        return heard >= sum(len(plan.holders(stage)) for stage in range(plan.num_stages))

    def clear(self: Votes) -> None:
        self.__dict__["num_heard"] = 0
        self._ready.clear()

    monkeypatch.setattr(Votes, "add", count)
    monkeypatch.setattr(Votes, "is_complete", is_complete)
    monkeypatch.setattr(Votes, "clear", clear)
    assert shown(monkeypatch)


def test_a_microbatch_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ToyReduction.share

    def share(self: ToyReduction, slot: SlotId, losses: Losses) -> None:
        if self._step == 3 and slot == SlotId(1, 1):
            self._gradients(slot).counts[1] += 1
        real(self, slot, losses)

    monkeypatch.setattr(ToyReduction, "share", share)
    assert "microbatches count [1, 2, 1, 1] times" in shown(monkeypatch)


def test_frames_that_come_again_are_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def accept(self: Steps, frame: Frame, payload: Payload) -> None:
        run: _Run = self._run(frame.step, frame.evaluate)
        if run.pipeline is None:
            run.early.append((frame, payload))
        else:
            self._deliver(run, frame, payload)

    monkeypatch.setattr(Steps, "_accept", accept)
    assert shown(monkeypatch)


def test_patience_goes_by_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def wall_s(self: Daemon) -> float:
        return self.swarm.directory.wall_s(self.machine)

    monkeypatch.setattr(Daemon, "monotonic_s", property(wall_s))
    assert "not done" in shown(monkeypatch, CLOCKS)


def test_commits_are_told_before_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Ledger.handle

    def hasty(self: Ledger, event: on.Event, now_s: float) -> list[on.Effect]:
        effects = real(self, event, now_s)
        told = [e for e in effects if isinstance(e, on.Send) and isinstance(e.message, Commit)]
        return told + [effect for effect in effects if effect not in told]

    monkeypatch.setattr(Ledger, "handle", hasty)
    assert "before it is in its journal" in shown(monkeypatch)
