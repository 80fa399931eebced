"""Whose word a new generation needs: majorities, ties, and to whom a coordinator hands over."""

from dataclasses import replace

import pytest

from swarmnode.coordinator.inquiry import GRACE_S, Inquiry
from swarmnode.domain import Generation, JobId, PeerId, Plan
from swarmnode.messages import Answer, Held

JOB = JobId("job")
NEXT = Generation(9)


def peers(names: str) -> tuple[PeerId, ...]:
    return tuple(map(PeerId, names))


def plan(coordinator: str, voters: str, before: str = "") -> Plan:
    return Plan(
        generation=Generation(3),
        layers=((0, 1),),
        slots=(peers(voters[:1]),),
        coordinator=PeerId(coordinator),
        voters=peers(voters),
        voters_before=peers(before),
        addresses={},
    )


def asked(me: str, before: Plan, *, is_begun: bool) -> Inquiry:
    inquiry = Inquiry(NEXT, before, PeerId(me), is_begun=is_begun)
    inquiry.ask(inquiry.voters, 0.0)
    return inquiry


def refusal(
    promised: int, to: str, *, in_touch: bool, adopted: int = 3, stages: tuple[int, ...] = ()
) -> Answer:
    held = tuple(Held(stage, 0, 1, 4, 0, 4) for stage in stages)
    return Answer(
        JOB, NEXT, False, Generation(promised), PeerId(to), held, (),
        in_touch=in_touch, adopted=Generation(adopted),
    )  # fmt: skip


def grant(to: str, *, is_new: bool = False) -> Answer:
    return Answer(JOB, NEXT, True, NEXT, PeerId(to), (), (), is_new=is_new)


@pytest.mark.parametrize(
    ("me", "voters", "agreed", "enough"),
    [
        ("a", "abc", "ab", True),
        ("b", "abc", "bc", True),
        ("a", "abc", "a", False),
        ("a", "abcd", "ab", True),  # half, with the first voter
        ("b", "abcd", "bc", False),
    ],
)
def test_a_majority_is_needed_or_half_with_the_coordinator_so_far(
    me: str, voters: str, agreed: str, enough: bool
) -> None:
    inquiry = asked(me, plan("a", voters), is_begun=True)
    assert inquiry.is_majority(set(peers(agreed))) is enough


def test_a_refused_candidate_hears_the_other_voters_out_before_it_asks_for_more() -> None:
    """The second refusal shows that a majority follows somebody else (seed 4277 of faults.toml)."""
    inquiry = asked("a", plan("a", "abc"), is_begun=True)
    inquiry.heard(PeerId("a"), grant("a"), 0.1)
    inquiry.heard(PeerId("b"), refusal(12, "c", in_touch=True), 0.2)
    assert inquiry.is_refused
    assert not inquiry.is_heard_out(0.3)
    assert inquiry.is_heard_out(GRACE_S), "who says nothing is not waited for"
    inquiry.heard(PeerId("c"), refusal(12, "c", in_touch=True), 0.4)
    assert inquiry.is_heard_out(0.4)
    assert inquiry.successor == "c"


def test_who_began_nothing_yet_wins_no_tie_among_the_voters_before() -> None:
    """Else two coordinators could each have half of them: the last one and the one before."""
    last = asked("b", plan("b", "bc", before="abcd"), is_begun=False)
    former = asked("a", plan("a", "abcd"), is_begun=True)
    assert former.is_majority(set(peers("ad")))
    assert not last.is_majority(set(peers("bc")))
    assert last.is_majority(set(peers("bcd")))


def test_who_does_not_know_whether_a_plan_began_needs_its_voters_too() -> None:
    inquiry = asked("c", plan("b", "bcd", before="aef"), is_begun=False)
    assert not inquiry.is_majority(set(peers("bcd")))
    assert not inquiry.is_majority(set(peers("caef")))
    assert inquiry.is_majority(set(peers("cdae")))


def test_a_job_is_handed_over_to_whom_a_majority_follows() -> None:
    inquiry = asked("a", plan("a", "abc"), is_begun=True)
    for peer in peers("bc"):
        assert inquiry.successor is None
        inquiry.heard(peer, refusal(12, "b", in_touch=True), 1.0)
    assert inquiry.successor == "b"


def test_a_promise_to_somebody_who_is_gone_hands_nothing_over() -> None:
    """A coordinator that died between the promises and its plan would leave the job to nobody."""
    inquiry = asked("b", plan("a", "abc"), is_begun=True)
    for peer in peers("bc"):
        inquiry.heard(peer, refusal(9, "a", in_touch=False), 1.0)
    assert inquiry.successor is None
    assert inquiry.is_refused
    assert inquiry.highest_promise == 9


@pytest.mark.parametrize(
    ("told", "is_over"),
    [("b", False), ("be", False), ("bc", False), ("bcd", True), ("a", True)],
)
def test_a_job_is_over_if_its_coordinator_says_so_or_most_voters(told: str, is_over: bool) -> None:
    """Who was away at its end would ask for ever; yet no single voter can end a job by a lie."""
    inquiry = asked("d", plan("a", "abcd"), is_begun=True)
    inquiry.ask(peers("e"), 0.0)
    for peer in peers(told):
        answer = refusal(12, "b", in_touch=True)
        inquiry.heard(peer, replace(answer, is_over=True), 1.0)
    assert inquiry.is_over is is_over


def test_a_voter_that_lost_its_disk_works_but_does_not_vote() -> None:
    """It may have promised itself to another before: its word would make two majorities."""
    inquiry = asked("b", plan("a", "abc"), is_begun=True)
    inquiry.heard(PeerId("b"), grant("b"), 1.0)
    inquiry.heard(PeerId("c"), grant("b", is_new=True), 1.0)
    assert set(inquiry.granted) == {"b", "c"}
    assert not inquiry.has_majority
    inquiry.heard(PeerId("a"), grant("b"), 1.0)
    assert inquiry.has_majority


def test_before_anything_has_begun_nobody_can_have_forgotten_it() -> None:
    inquiry = asked("b", plan("a", "abc"), is_begun=False)
    inquiry.heard(PeerId("b"), grant("b"), 1.0)
    inquiry.heard(PeerId("c"), grant("b", is_new=True), 1.0)
    assert inquiry.has_majority


def test_a_higher_number_is_tried_once_those_who_refused_would_make_the_majority() -> None:
    inquiry = asked("a", plan("a", "abcde"), is_begun=True)
    inquiry.heard(PeerId("a"), grant("a"), 1.0)
    inquiry.heard(PeerId("b"), grant("a"), 1.0)
    assert not inquiry.is_refused
    inquiry.heard(PeerId("c"), refusal(9, "c", in_touch=False), 1.0)
    assert inquiry.is_refused
    inquiry.heard(PeerId("d"), grant("a"), 1.0)
    assert not inquiry.is_refused


def test_who_refused_is_asked_once_more_as_soon_as_a_majority_has_agreed() -> None:
    inquiry = asked("a", plan("a", "abc"), is_begun=True)
    inquiry.heard(PeerId("c"), refusal(5, "c", in_touch=False, adopted=5), 1.0)
    inquiry.heard(PeerId("a"), grant("a"), 1.0)
    assert inquiry.insist() == [], "one of three"
    inquiry.heard(PeerId("b"), grant("a"), 1.0)
    assert inquiry.ask(inquiry.insist(), 1.0) == ["c"]
    assert not inquiry.is_settled(1.5), "it has time to answer again"
    inquiry.heard(PeerId("c"), refusal(5, "c", in_touch=True, adopted=5), 1.6)
    assert inquiry.insist() == []
    assert inquiry.is_settled(1.7)


def test_who_promised_itself_as_high_to_another_is_outbid_and_not_asked_once_more() -> None:
    inquiry = asked("a", plan("a", "abc"), is_begun=True)
    for peer in peers("ab"):
        inquiry.heard(peer, grant("a"), 1.0)
    inquiry.heard(PeerId("c"), refusal(5, "c", in_touch=False), 1.0)
    assert not inquiry.is_outbid, "no number would change its mind"
    inquiry.heard(PeerId("c"), refusal(9, "c", in_touch=False), 1.0)
    assert inquiry.is_outbid
    assert inquiry.insist() == []


def test_who_cannot_win_leaves_it_to_whom_its_own_voice_makes_the_winner() -> None:
    """Two of four have adopted a plan of b; a does not know it, and d has lost its disk."""
    inquiry = asked("a", plan("a", "abcd"), is_begun=True)
    inquiry.heard(PeerId("a"), grant("a"), 1.0)
    inquiry.heard(PeerId("d"), grant("a", is_new=True), 1.0)
    for peer in peers("bc"):
        assert inquiry.successor is None
        inquiry.heard(peer, refusal(4, "b", in_touch=True, adopted=4), 1.0)
    assert inquiry.successor == "b"


@pytest.mark.parametrize(
    ("adopted", "is_forgetful", "in_touch"),
    [(3, True, True), (4, False, True), (4, True, False)],
    ids=["a higher number may win", "with d it could", "b is gone"],
)
def test_who_may_still_win_does_not_step_down(
    adopted: int, is_forgetful: bool, in_touch: bool
) -> None:
    inquiry = asked("a", plan("a", "abcd"), is_begun=True)
    inquiry.heard(PeerId("a"), grant("a"), 1.0)
    inquiry.heard(PeerId("d"), grant("a", is_new=is_forgetful), 1.0)
    for peer in peers("bc"):
        inquiry.heard(peer, refusal(4, "b", in_touch=in_touch, adopted=adopted), 1.0)
    assert inquiry.successor is None


def test_of_two_that_know_different_plans_only_the_one_with_the_older_one_steps_down() -> None:
    """Else the job would be left to nobody."""
    older = asked("a", plan("a", "abcde"), is_begun=True)
    later = replace(plan("b", "bd", before="abcde"), generation=Generation(4))
    newer = asked("b", later, is_begun=False)
    for peer, to in zip(peers("acbd"), peers("aabb"), strict=True):
        for inquiry, me in ((older, "a"), (newer, "b")):
            refused = refusal(9, to, in_touch=True, adopted=4 if to == "b" else 3)
            inquiry.heard(peer, grant(me) if to == me else refused, 1.0)
    for inquiry, me in ((older, "a"), (newer, "b")):
        inquiry.heard(PeerId("e"), grant(me, is_new=True), 1.0)
    assert older.successor == "b"
    assert newer.successor is None


def test_a_rival_is_one_whose_followers_hold_what_is_missing() -> None:
    inquiry = asked("a", plan("a", "abc"), is_begun=True)
    inquiry.heard(PeerId("c"), refusal(5, "c", in_touch=True, stages=(1,)), 1.0)
    assert inquiry.rival((1,)) == "c"
    assert inquiry.rival((0,)) is None
    inquiry.heard(PeerId("c"), refusal(5, "c", in_touch=False, stages=(1,)), 1.0)
    assert inquiry.rival((1,)) is None


def test_who_knows_no_plan_of_a_job_tells_nobody_that_theirs_is_void() -> None:
    inquiry = Inquiry(NEXT, None, PeerId("a"))
    inquiry.ask(peers("ab"), 0.0)
    inquiry.heard(PeerId("a"), grant("a"), 1.0)
    inquiry.heard(PeerId("b"), refusal(5, "c", in_touch=False, adopted=5), 1.0)
    assert inquiry.has_majority
    assert not inquiry.is_agreed
    assert inquiry.insist() == []


@pytest.mark.parametrize(
    ("later", "leads", "found"),
    [
        ("bc", "z", "z"),
        ("c", "z", None),  # we may still win without it
        ("bc", "a", None),  # nobody else can be left to stand
    ],
)
def test_a_candidate_without_which_a_majority_knows_a_later_plan_is_behind(
    later: str, leads: str, found: str | None
) -> None:
    inquiry = asked("a", plan("a", "abc"), is_begun=True)
    inquiry.heard(PeerId("a"), grant("a"), 1.0)
    for peer in peers("bc"):
        adopted = 4 if peer in later else 3
        inquiry.heard(peer, refusal(9, leads, in_touch=False, adopted=adopted), 1.0)
    assert inquiry.ahead == found
