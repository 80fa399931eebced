"""Newcomers fetch what they need before they get slots: of whom, and what if that fails."""

from dataclasses import replace

import pytest

from swarmnode.coordinator.events import Effect, Send
from swarmnode.coordinator.preparing import (
    MAX_FAILURES,
    PATIENCE_S,
    SLOW_BYTES_PER_S,
    Preparing,
)
from swarmnode.coordinator.recovery import STATE_BYTES_PER_WEIGHT
from swarmnode.coordinator.solver.decision import Decision
from swarmnode.domain import BlobRef, Generation, JobId, PeerId, Plan
from swarmnode.messages import Prepare, Prepared, Save, Saved
from tests.coordinator.bench import FACTS

A, B, C, NEW = (PeerId(name) for name in ("a", "b", "c", "new"))
JOB, GENERATION = JobId("job"), Generation(3)
LAYERS = ((0, 2), (2, 4))
PLAN = Plan(GENERATION, LAYERS, ((A, B), (C, C)), A, shadows=((), (B,)))
WANTED = Decision(LAYERS, ((NEW, B), (C, C)), 1.0, 0.5, (), ())
INDEX = BlobRef("0" * 64, 10)


def preparing(*leavers: PeerId) -> Preparing:
    return Preparing(JOB, WANTED, ((), (NEW,)), PLAN, set(leavers).__contains__, FACTS, 0.0)


def saves(effects: list[Effect]) -> dict[int, tuple[PeerId, int]]:
    """stage -> who is asked for its state, after how many steps."""
    return {
        effect.message.stage: (effect.peer, effect.message.step)
        for effect in effects
        if isinstance(effect, Send) and isinstance(effect.message, Save)
    }


def publish(found: Preparing, asked: dict[int, tuple[PeerId, int]]) -> list[Prepare]:
    """All who were asked publish; what the newcomers are told."""
    effects = [
        effect
        for stage, (peer, step) in asked.items()
        for effect in found.saved(peer, Saved(JOB, GENERATION, step, stage, INDEX))
    ]
    return [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, Prepare)]


@pytest.mark.parametrize(
    ("leavers", "givers"),
    [((), (A, C)), ((A,), (B, C)), ((A, C), (B, B)), ((A, B, C), (A, C))],
    ids=["nobody leaves", "the first slot", "a shadow stays", "all do"],
)
def test_who_stays_is_asked_for_the_state(
    leavers: tuple[PeerId, ...], givers: tuple[PeerId, ...]
) -> None:
    asked = saves(preparing(*leavers).ask(7, 0.0))
    assert asked == {stage: (peer, 7) for stage, peer in enumerate(givers)}


def test_a_newcomer_is_told_once_every_stage_is_published() -> None:
    found = preparing()
    asked = saves(found.ask(7, 0.0))
    assert found.ask(8, 0.0) == [], "once"
    first = found.saved(A, Saved(JOB, GENERATION, 7, 0, INDEX))
    assert first == []
    assert found.saved(B, Saved(JOB, GENERATION, 7, 1, INDEX)) == [], "it was not asked"
    (told,) = publish(found, asked)
    assert [(stage, source.providers) for stage, source in told.sources] == [(0, (A,)), (1, (C,))]
    assert not found.is_ready
    found.heard(NEW, Prepared(JOB, GENERATION, 7))
    assert found.is_ready


def test_who_could_not_fetch_gets_a_newer_state_of_somebody_else() -> None:
    found = preparing()
    publish(found, saves(found.ask(7, 0.0)))
    found.heard(NEW, Prepared(JOB, GENERATION, 7, "gone"))
    assert not found.is_ready
    asked = saves(found.ask(9, 0.0))
    assert asked == {0: (B, 9), 1: (B, 9)}
    (told,) = publish(found, asked)
    assert told.step == 9
    found.heard(NEW, Prepared(JOB, GENERATION, 9))
    assert found.is_ready


def test_an_answer_to_an_earlier_question_does_not_count() -> None:
    """Another preparation had been under way when somebody said that it leaves."""
    found = preparing()
    publish(found, saves(found.ask(7, 0.0)))
    found.heard(NEW, Prepared(JOB, GENERATION, 6))
    found.heard(B, Prepared(JOB, GENERATION, 7))
    assert not found.is_ready


def test_who_waits_long_for_the_next_commit_is_not_late_when_it_comes() -> None:
    """A step, or a round of local steps, may take minutes: only then are states asked for."""
    found = preparing()
    assert not found.is_overdue(10 * PATIENCE_S)
    publish(found, saves(found.ask(7, 10 * PATIENCE_S)))
    assert not found.is_overdue(10.9 * PATIENCE_S)
    assert found.is_overdue(11.1 * PATIENCE_S)


def test_a_large_state_may_take_longer() -> None:
    large = replace(FACTS, layer_weights=100_000_000)
    found = Preparing(JOB, WANTED, ((), (NEW,)), PLAN, set().__contains__, large, 0.0)
    found.ask(7, 0.0)
    fetched_s = 4 * 100_000_000 * STATE_BYTES_PER_WEIGHT / SLOW_BYTES_PER_S
    assert not found.is_overdue(fetched_s)
    assert found.is_overdue(fetched_s + 1.1 * PATIENCE_S)


def test_who_fails_to_fetch_again_and_again_does_without() -> None:
    found = preparing()
    for step in range(7, 7 + MAX_FAILURES):
        assert not found.is_overdue(0.0)
        publish(found, saves(found.ask(step, 0.0)))
        found.heard(NEW, Prepared(JOB, GENERATION, step, "gone"))
    assert found.is_overdue(0.0)
