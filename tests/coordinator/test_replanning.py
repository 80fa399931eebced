"""When the solver is asked, and what becomes of its answers."""

import pytest

from swarmnode.coordinator.measurements import Measurements
from swarmnode.coordinator.replanning import PATIENCE_S, PERIOD_S, SETTLE_S, Replanning
from swarmnode.coordinator.solver.decision import Decision
from swarmnode.coordinator.solver.request import Improvement
from swarmnode.domain import Generation, PeerId
from swarmnode.messages import (
    LinkReport,
)
from tests.coordinator.bench import advert

A, B = PeerId("a"), PeerId("b")
ONE = Generation(1)


def found(current_s: float = 2.0, cost_s: float = 1.0) -> Improvement:
    return Improvement(Decision(((0, 1),), ((A,),), cost_s, None, (), ()), current_s, 0.0)


def settled() -> Replanning:
    replanning = Replanning(0.0)
    replanning.see([advert("a")])
    replanning.placed(0.0)
    return replanning


def test_a_new_placement_is_looked_at_once_it_has_settled_and_then_now_and_then() -> None:
    replanning = settled()
    assert not replanning.wants_answer(SETTLE_S - 0.1)
    assert replanning.wants_answer(SETTLE_S)
    assert not replanning.wants_answer(SETTLE_S + 1)  # waits for the answer
    replanning.answered(ONE, ONE, found(1.0, 1.0), SETTLE_S + 2)
    assert not replanning.wants_answer(SETTLE_S + PERIOD_S - 1)
    assert replanning.wants_answer(SETTLE_S + PERIOD_S)


def test_whoever_comes_or_goes_is_a_reason_to_look_again_and_shortens_the_calm() -> None:
    replanning = settled()
    assert replanning.wants_answer(SETTLE_S)
    replanning.answered(ONE, ONE, found(1.0, 1.0), SETTLE_S)
    calm_s = replanning.churn.calm_s(SETTLE_S)
    replanning.see([advert("a"), advert("b")])
    assert replanning.wants_answer(SETTLE_S + 1)
    assert replanning.churn.calm_s(SETTLE_S) == pytest.approx(calm_s / 2)
    replanning.answered(ONE, ONE, None, SETTLE_S + 2)
    replanning.see([advert("a"), advert("b")])
    assert not replanning.wants_answer(SETTLE_S + 3)


def test_a_lost_answer_is_asked_for_again() -> None:
    replanning = settled()
    assert replanning.wants_answer(SETTLE_S)
    assert not replanning.wants_answer(SETTLE_S + PATIENCE_S - 1)
    assert replanning.wants_answer(SETTLE_S + PATIENCE_S)


def test_an_answer_is_taken_once_and_only_while_its_machines_are_here() -> None:
    replanning = settled()
    replanning.answered(ONE, ONE, found(), 10.0)
    assert replanning.take([advert("b")]) is None
    replanning.answered(ONE, ONE, found(), 10.0)
    assert replanning.take([advert("a")]) == found().decision
    assert replanning.take([advert("a")]) is None


def test_moves_of_choice_become_rare_until_somebody_comes_or_goes() -> None:
    replanning = settled()
    for pause_s in (SETTLE_S, 2 * SETTLE_S, 4 * SETTLE_S):
        assert not replanning.wants_answer(pause_s - 0.1)
        assert replanning.wants_answer(pause_s)
        replanning.answered(ONE, ONE, found(), pause_s)
        assert replanning.take([advert("a")]) is not None
        replanning.placed(0.0)
    replanning.see([advert("a"), advert("b")])
    assert replanning.wants_answer(SETTLE_S)


def test_conversations_are_interrupted_only_when_somebody_comes_or_goes() -> None:
    replanning = settled()
    assert replanning.wants_answer(SETTLE_S)
    replanning.serves()
    replanning.answered(ONE, ONE, found(), SETTLE_S + 1)  # asked about steps
    assert replanning.chosen is None
    assert not replanning.wants_answer(10 * PERIOD_S, serves=True)
    replanning.see([advert("a"), advert("b")])
    assert replanning.wants_answer(10 * PERIOD_S + 1, serves=True)
    replanning.answered(ONE, ONE, found(), 10 * PERIOD_S + 2)
    assert replanning.chosen is not None


def test_what_is_not_worth_it_is_not_taken_and_says_why() -> None:
    replanning = settled()
    replanning.answered(ONE, ONE, found(1.0, 0.99), 10.0)
    assert replanning.chosen is None
    assert "too little" in replanning.verdict


def test_a_machine_s_speed_is_its_mean_over_steps_that_nothing_disturbed() -> None:
    measured = Measurements()
    measured.busy(A, 1.0)
    measured.busy(A, 1.0)
    measured.step_done({A: 10.0, B: 10.0})
    assert measured.flops == {A: 5.0}  # of B nobody knows anything
    measured.busy(A, 100.0)
    measured.disturbed()
    measured.step_done({A: 10.0})
    assert measured.flops == {A: 5.0}
    for _ in range(40):
        measured.busy(A, 1.0)
        measured.step_done({A: 10.0})
    assert measured.flops[A] == pytest.approx(10.0, rel=0.01)


def test_the_newest_word_about_a_link_counts_and_goes_with_its_ends() -> None:
    measured = Measurements()
    measured.linked(A, [LinkReport(B, 0.1, None)])
    measured.linked(A, [LinkReport(B, 0.2, 1e6)])
    (link,) = measured.links
    assert (link.latency_s, link.bytes_per_s) == (0.2, 1e6)
    measured.forget(B)
    assert measured.links == ()
