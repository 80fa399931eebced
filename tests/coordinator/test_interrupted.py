"""Checkpoints and evaluations that a loss interrupts: of one history only, and made up for."""

import dataclasses
from collections.abc import Iterator
from itertools import pairwise

import pytest

from swarmnode.coordinator import events as on
from swarmnode.coordinator.publications import PAUSE_S, Publications
from swarmnode.domain import BlobRef, Generation, PeerId
from swarmnode.messages import Evaluated, Ready, Save, Saved
from tests.coordinator.bench import Bench, histories, manifest

STEPS = 10


def held_back(bench: Bench, step: int, kind: type[object]) -> Iterator[on.Event]:
    """Take events of that kind about the state after `step` steps out of what is under way."""
    for event in list(bench.inbox):
        found = event.message if isinstance(event, on.Heard) else event
        if isinstance(found, kind) and getattr(found, "step", None) == step:
            bench.inbox.remove(event)
            yield event


def until_saved(bench: Bench, step: int) -> list[on.Event]:
    """Run until the states after `step` steps are on their way; the word that they are stored."""
    late: list[on.Event] = []
    while len(late) < 2:
        late += held_back(bench, step, on.StateStored)
        bench.next() if bench.inbox else bench.tick(1.0)
    return late


def lose_a_stage(bench: Bench) -> None:
    """Both its holders, who come back with nothing: the job goes back to its checkpoint."""
    plan = bench.ledger.plan
    assert plan is not None
    stage = next(s for s in range(2) if "a" not in plan.holders(s))
    for victim in plan.holders(stage):
        bench.kill(victim)
    bench.forget_messages()
    for victim in plan.holders(stage):
        bench.revive(victim)


def test_a_checkpoint_of_a_history_that_was_given_up_never_counts() -> None:
    bench = Bench(manifest(slots=1, steps=STEPS, checkpoint_every=2), "abc").start()
    late = until_saved(bench, 4)
    assert bench.ledger.checkpoint is not None
    assert bench.ledger.checkpoint.step == 2
    lose_a_stage(bench)
    while bench.ledger.phase != "training":
        bench.next() if bench.inbox else bench.tick(1.0)
    assert bench.ledger.step == 2, "back to the checkpoint"
    for event in late:
        bench.feed(event)
    assert bench.ledger.checkpoint.step == 2, "steps 3 and 4 are not committed any more"
    bench.run()
    assert histories(bench) == {tuple(range(STEPS))}
    assert len(bench.ledger.progress.losses) == STEPS


def test_who_was_asked_before_the_job_went_back_does_not_answer_the_second_question() -> None:
    bench = Bench(manifest(slots=1), "abc").start()
    bench.run(until="training")
    plan = bench.ledger.plan
    assert plan is not None
    publications, index = Publications(), BlobRef("1" * 64, 1)

    def ask(generation: int) -> tuple[PeerId, Saved]:
        """Ask for the state after four steps; what its first holder would answer."""
        asked = dataclasses.replace(plan, generation=Generation(generation))
        (first, *_) = publications.ask(bench.job.job, asked, 4, 0.0)
        assert isinstance(first, on.Send)
        save = first.message
        assert isinstance(save, Save)
        return first.peer, Saved(save.job, save.generation, save.step, save.stage, index)

    peer, late = ask(3)
    publications.rewind(2)
    assert publications.published(peer, late) == []
    peer, right = ask(5)
    assert publications.published(peer, late) == []
    stored = on.StoreState(right.stage, 4, index, peer)
    assert publications.published(peer, right) == [stored]


@pytest.mark.parametrize(("is_lost", "steps"), [(False, [4, 8, 10]), (True, [5, 8, 10])])
def test_a_checkpoint_that_came_to_nothing_is_made_with_the_next_step(
    is_lost: bool, steps: list[int]
) -> None:
    bench = Bench(manifest(steps=STEPS, checkpoint_every=4), "abcd").start()
    while is_lost and not list(held_back(bench, 4, Saved)):
        bench.next()
    if is_lost:
        list(held_back(bench, 4, Saved))
        bench.kill("d")
    bench.run()
    assert [r.step for r in bench.journal if isinstance(r, on.CheckpointRecord)] == steps


def test_an_evaluation_that_a_restart_interrupted_is_made_up_for() -> None:
    job = manifest(steps=STEPS)
    job = job.model_copy(update={"run": job.run.model_copy(update={"evaluate_every": 3})})
    first = Bench(job, "abcd").start()
    while first.ledger.phase != "evaluating" or not list(held_back(first, 3, Evaluated)):
        first.next()
    assert not any(isinstance(record, on.EvaluationRecord) for record in first.journal)
    second = Bench(job, "abcd", records=first.journal)
    second.workers, second.published = first.workers, first.published
    second.start()
    second.run()
    made = [r.step for r in second.journal if isinstance(r, on.EvaluationRecord)]
    assert made == [3, 6, 9, 10]


@pytest.mark.parametrize("num_lost", [0, 4])
def test_a_checkpoint_that_cannot_be_stored_is_not_asked_for_with_every_step(num_lost: int) -> None:
    """There is no room for it; the pauses double, and the last state is waited for."""
    steps, second_s = 200, 1.0
    bench = Bench(manifest(steps=steps, checkpoint_every=2), "abcd").start()
    times: list[float] = []
    while bench.ledger.phase != "serving":
        if not bench.inbox:
            bench.tick(second_s)
            continue
        event = bench.inbox[0]
        if isinstance(event, on.StateStored) and event.stage == 0 and len(times) < num_lost:
            times.append(bench.now_s)
            bench.inbox[0] = on.StateLost(0, event.step, event.index, "no space")
        if isinstance(event, on.Heard) and isinstance(event.message, Ready):
            bench.now_s += second_s / 4  # a step takes a second
        bench.next()
    pauses = [after - before for before, after in pairwise(times)]
    assert pauses == sorted(pauses)
    assert all(pause >= PAUSE_S for pause in pauses)
    made = [r.step for r in bench.journal if isinstance(r, on.CheckpointRecord)]
    assert made[-1] == steps
    assert (len(made) == steps // 2) == (num_lost == 0)
