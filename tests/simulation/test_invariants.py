"""The invariants themselves: what they are told, what they refuse, and what they let pass."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest

from swarmnode.coordinator.events import BegunRecord, CommitRecord, StartedRecord
from swarmnode.coordinator.forming import SEARCH_S
from swarmnode.domain import BlobRef, Generation, JobId, PeerId, Plan, SlotId
from swarmnode.messages import Commit, Ready
from swarmnode.simulation.history import History
from swarmnode.simulation.invariants import Invariants, Violation
from swarmnode.simulation.presence import FOUND_S, NUM_MOMENTS, Presence

JOB = JobId("job")


class Told:
    """What invariants are told of a job of two stages; each of a and b holds one of them."""

    def __init__(self) -> None:
        self.invariants, self._history = Invariants(), History(2, 1, 1, 1, 1.0)
        self.invariants.add(JOB, self._history)

    def begins(self, generation: int, who: str, step: int, reached: str = "ab") -> None:
        """A coordinator tells a plan; `reached`: whom it could reach all the time."""
        plan = plan_of(generation, who)
        self.invariants.journaled(JOB, who, StartedRecord.of(plan, step))
        self.invariants.begun(JOB, who, plan, step, moments(reached))

    def says(self, generation: int, step: int, peers: str = "ab") -> None:
        for peer in peers:
            slot = SlotId("ab".index(peer), 0)
            update = BlobRef("0" * 64, 1)
            self.invariants.said(
                peer, Ready(JOB, Generation(generation), step, slot, (0,), update, (), ())
            )

    def commits(self, generation: int, who: str, step: int, num_steps: int = 1) -> None:
        for at in range(step, step + num_steps):
            self.says(generation, at)
            self.writes(generation, who, at)

    def takes_over(self, who: str, num_steps: int) -> None:
        """Somebody goes on from its copy of the journal, with so many steps."""
        self.invariants.replaced_journal(JOB, who)
        self.invariants.restored(JOB, who, num_steps)

    def writes(self, generation: int, who: str, step: int) -> None:
        """A coordinator writes a commit; all have said that they are ready."""
        right = self._history.step(step)
        record = CommitRecord(Generation(generation), step, right.scale, 1.0, right.updates)
        self.invariants.journaled(JOB, who, record)


def plan_of(generation: int, who: str) -> Plan:
    slots = ((PeerId("a"),), (PeerId("b"),))
    return Plan(Generation(generation), ((0, 1), (1, 2)), slots, PeerId(who))


def moments(peers: str) -> Callable[[str], set[int]]:
    return lambda peer: {0} if peer in peers else set()


def test_a_step_is_in_a_journal_once() -> None:
    told = Told()
    told.begins(1, "a", 0)
    told.commits(1, "a", 0, 2)
    with pytest.raises(Violation, match="commits step 1 of generation 1, but its journal has 2"):
        told.writes(1, "a", 1)


def test_a_step_is_in_a_journal_once_after_a_restart_or_a_takeover_too() -> None:
    told = Told()
    told.begins(1, "a", 0)
    told.commits(1, "a", 0, 2)
    told.invariants.restored(JOB, "a", 2)
    told.takes_over("b", 2)
    for who in "ab":
        with pytest.raises(Violation, match="but its journal has 2 steps"):
            told.writes(1, who, 1)


def test_who_takes_over_may_commit_what_the_last_one_committed_before_it_was_lost() -> None:
    told = Told()
    told.begins(1, "a", 0)
    told.commits(1, "a", 0, 2)
    told.takes_over("b", 1)
    told.writes(1, "b", 1)
    told.begins(2, "b", 2)
    told.commits(2, "b", 2)
    assert told.invariants.num_committed(JOB) == 3


@pytest.mark.parametrize("what", ["commit", "plan", "all are placed"])
def test_what_a_former_coordinator_writes_late_hides_no_loss_by_its_successor(what: str) -> None:
    """a was stopped in generation 1, or before it told of generation 2; b has three steps more."""
    told = Told()
    told.begins(1, "a", 0)
    told.commits(1, "a", 0)
    told.takes_over("b", 1)
    told.begins(3, "b", 1)
    told.commits(3, "b", 1, 3)
    if what == "commit":
        told.writes(1, "a", 1)
    elif what == "plan":
        told.begins(2, "a", 1)
    else:
        told.invariants.journaled(JOB, "a", BegunRecord(Generation(1)))
    with pytest.raises(Violation, match="b goes back to step 2 of 4"):
        told.begins(4, "b", 2)


def test_a_plan_of_before_that_is_told_late_gives_up_nothing() -> None:
    told = Told()
    told.begins(1, "a", 0)
    told.takes_over("b", 0)
    told.begins(3, "b", 0)
    told.commits(3, "b", 0, 2)
    told.begins(2, "a", 0)
    told.begins(4, "b", 2)
    told.commits(4, "b", 2)


def test_a_commit_of_before_that_is_written_late_is_no_step_that_can_be_lost() -> None:
    """b knew nothing of it, and computes the step again; while it does so, somebody is lost."""
    told = Told()
    told.begins(1, "a", 0)
    told.commits(1, "a", 0)
    told.takes_over("b", 1)
    told.begins(2, "b", 1)
    told.writes(1, "a", 1)
    told.says(2, 1)
    told.begins(3, "b", 1)


def test_who_takes_over_with_less_of_the_journal_hides_no_loss_by_what_it_finds() -> None:
    told = Told()
    told.begins(1, "a", 0)
    told.commits(1, "a", 0, 4)
    told.takes_over("b", 1)
    told.writes(1, "b", 1)
    with pytest.raises(Violation, match="b goes back to step 2 of 4"):
        told.begins(2, "b", 2)


@pytest.mark.parametrize("begun", [1, 2])
def test_that_all_were_placed_long_ago_makes_nobody_a_holder_now(begun: int) -> None:
    """Once the plan of 2 has begun, who was in the one before may have been let go."""
    told = Told()
    told.begins(1, "a", 0)
    told.commits(1, "a", 0, 2)
    told.begins(2, "a", 2)
    told.begins(3, "b", 2)
    if begun == 1:
        told.invariants.damaged("a")
    told.invariants.journaled(JOB, "a", BegunRecord(Generation(begun)))
    told.begins(4, "b", 1)


@pytest.mark.parametrize("loses_it", [True, False])
def test_who_lost_its_disk_before_its_word_of_the_state_came_has_no_state(loses_it: bool) -> None:
    """Seed 3586: Placed was on its way when the disk was wiped."""
    told = Told()
    told.begins(1, "a", 0)
    told.commits(1, "a", 0, 2)
    told.begins(2, "a", 2)
    if loses_it:
        told.invariants.damaged("b")
    told.invariants.journaled(JOB, "a", BegunRecord(Generation(2)))
    with nullcontext() if loses_it else pytest.raises(Violation, match="goes back to step 0 of 2"):
        told.begins(3, "a", 0)


@pytest.mark.parametrize("late", ["", "a", "b", "ab"])
def test_nobody_is_told_of_a_commit_before_all_have_its_update(late: str) -> None:
    told = Told()
    told.begins(1, "a", 0)
    told.commits(1, "a", 0)
    told.says(1, 1, "".join(peer for peer in "ab" if peer not in late))
    told.writes(1, "a", 1)
    with pytest.raises(Violation, match="have its update") if late else nullcontext():
        told.invariants.commit_sent(JOB, "a", Commit(JOB, Generation(1), 1, 1.0))


@pytest.mark.parametrize(
    ("voters", "before", "needed"),
    [("abc", "", ""), ("abcd", "", ""), ("ab", "", "a"), ("bc", "", "bc"), ("abc", "bc", "bc")],
)
def test_without_whom_the_other_voters_are_no_majority(
    voters: str, before: str, needed: str
) -> None:
    """Half of them are one with the coordinator."""
    plan = Plan(
        Generation(1), ((0, 1),), ((PeerId("a"),),), PeerId("a"),
        voters=tuple(map(PeerId, voters)), voters_before=tuple(map(PeerId, before)),
    )  # fmt: skip
    invariants = Told().invariants
    assert invariants.has_majority_without("a"), "nothing has begun"
    invariants.begun(JOB, "a", plan, 0, moments(""))
    assert [peer for peer in "abcde" if not invariants.has_majority_without(peer)] == list(needed)


@pytest.mark.parametrize(
    ("said", "reached", "damaged", "is_found"),
    [
        ("ab", "ab", "", True),
        ("ab", "a", "", False),
        ("a", "ab", "", False),
        ("", "ab", "", False),
        ("ab", "ab", "b", False),
    ],
)
def test_steps_are_given_up_only_where_nobody_who_held_them_can_be_reached(
    said: str, reached: str, damaged: str, is_found: bool
) -> None:
    told = Told()
    told.begins(1, "a", 0)
    told.says(1, 0, said)
    told.writes(1, "a", 0)
    for peer in damaged:
        told.invariants.damaged(peer)
    with pytest.raises(Violation, match="goes back to step 0 of 1") if is_found else nullcontext():
        told.begins(2, "a", 0, reached)


def test_holders_of_all_stages_have_to_be_there_at_one_time() -> None:
    told = Told()
    told.begins(1, "a", 0)
    told.commits(1, "a", 0)
    plan = plan_of(2, "a")
    told.invariants.begun(JOB, "a", plan, 0, {"a": {0, 1, 2}, "b": {3, 4}}.__getitem__)

    told = Told()
    told.begins(1, "a", 0)
    told.commits(1, "a", 0)
    with pytest.raises(Violation, match="although 2 s ago it could reach"):
        told.invariants.begun(JOB, "a", plan, 0, {"a": {0, 1, 2}, "b": {2, 3, 4}}.__getitem__)


def test_a_machine_counts_once_it_could_answer_for_long_enough_and_until_it_cannot() -> None:
    presence, now_s = Presence(), 100.0
    everything = set(range(NUM_MOMENTS))
    assert max(everything) < SEARCH_S
    assert presence.moments("a", "b", now_s) == everything
    presence.begins(("b", "down"), now_s - 10.5)
    assert presence.moments("a", "b", now_s) == set(range(11, NUM_MOMENTS))
    presence.ends(("b", "down"), now_s - 10.0)
    assert presence.moments("a", "b", now_s) == set(range(11, NUM_MOMENTS))
    assert 0 in presence.moments("a", "b", now_s - 10.0 + FOUND_S)
    assert presence.moments("a", "c", now_s) == everything, "b is no affair of theirs"


@pytest.mark.parametrize("way", [("a", "b"), ("b", "a")])
def test_a_machine_of_which_nothing_arrives_or_that_hears_nothing_counts_no_more(
    way: tuple[str, str],
) -> None:
    presence = Presence()
    presence.begins(way, 50.0)
    assert presence.moments("a", "b", 100.0) == set()
    assert presence.moments("a", "c", 100.0) == set(range(NUM_MOMENTS))
