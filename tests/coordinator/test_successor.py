"""What a coordinator finds that comes after another: steps nobody told it of, plans that never
began, and holders that refuse."""

import math
from dataclasses import replace

import pytest

from swarmnode.coordinator import events as on
from swarmnode.coordinator.forming import CHECK_S, MAX_SEARCH_S, SEARCH_S
from swarmnode.coordinator.progress import Progress
from swarmnode.coordinator.votes import Votes
from swarmnode.domain import BlobRef, Generation, PeerId, Plan, SlotId
from swarmnode.heartbeats import Checking
from swarmnode.messages import Begin, Inquire, Ready
from tests.coordinator.bench import Bench, histories, manifest

STEPS = 5
A, B = PeerId("a"), PeerId("b")


def trained(step: int) -> Bench:
    """A job of four nodes that has committed `step` steps, with all Readys of the next said."""
    bench = Bench(manifest(steps=STEPS), "abcd").start()
    while bench.ledger.phase != "training" or bench.ledger.step < step:
        bench.next()
    assert all(worker.ready for worker in bench.workers.values())
    return bench


def successor(first: Bench, me: str = "b") -> Bench:
    """Somebody goes on from the journal, with the workers as they are."""
    second = Bench(manifest(steps=STEPS), "abcd", records=first.journal, me=me)
    second.workers, second.published = first.workers, first.published
    return second


def others_at(bench: Bench, stage: int) -> list[PeerId]:
    plan = bench.ledger.plan
    assert plan is not None
    return [peer for peer in plan.holders(stage) if peer != A]


def computed(bench: Bench) -> list[int]:
    return [s.message.step for s in bench.sent if isinstance(s.message, Begin)]


@pytest.mark.parametrize("stage", [0, 1])
def test_one_holder_of_each_stage_is_enough_to_find_a_step_that_was_ready(stage: int) -> None:
    """The coordinator before may have committed it, told somebody, and died with that one."""
    first = trained(2)
    dead = others_at(first, stage)[-1]
    del first.workers[dead]
    me = next(peer for peer in first.workers if peer != A)
    second = successor(first, me).start()
    second.run()
    assert second.commits() == list(range(STEPS))
    assert min(computed(second)) == 3, "step 2 was ready: nobody computes it again"
    assert histories(second) == {tuple(range(STEPS))}


def test_whose_own_journal_says_that_it_committed_nothing_wants_all_copies_of_a_step() -> None:
    first = trained(2)
    del first.workers[others_at(first, 1)[-1]]
    again = successor(first, "a").start()
    again.run()
    assert min(computed(again)) == 2
    assert again.commits() == list(range(STEPS))


def test_whose_number_was_taken_cannot_know_that_nobody_committed_the_step() -> None:
    first = trained(2)
    del first.workers[others_at(first, 1)[-1]]
    assert first.ledger.plan is not None
    for worker in first.workers.values():  # somebody asked meanwhile, and may have finished it
        worker.promised, worker.promised_to = first.ledger.plan.generation + 1, "z"
        worker.in_touch = False
    again = successor(first, "a").start()
    again.run()
    assert min(computed(again)) == 3
    assert again.commits() == list(range(STEPS))


def test_a_step_of_which_one_stage_has_no_update_is_computed_again() -> None:
    first = trained(2)
    plan = first.ledger.plan
    assert plan is not None
    for peer in plan.holders(1):
        first.workers[peer].ready = ()
    second = successor(first).start()
    second.run()
    assert min(computed(second)) == 2
    assert second.commits() == list(range(STEPS))


def test_the_ready_of_one_that_died_with_the_only_update_commits_nothing() -> None:
    bench = trained(2)
    dead, plan = others_at(bench, 1)[0], bench.ledger.plan
    assert plan is not None
    alone = [peer for peer in plan.holders(1) if peer != dead]
    bench.inbox = type(bench.inbox)(
        event for event in bench.inbox if not (isinstance(event, on.Heard) and event.peer in alone)
    )
    for peer in alone:
        bench.workers[peer].ready = ()
        bench.workers[peer].logs[1].pop(2)
    while bench.inbox:
        bench.next()
    assert bench.commits() == [0, 1]
    bench.kill(dead)
    bench.run()
    assert bench.commits() == list(range(STEPS))
    assert histories(bench) == {tuple(range(STEPS))}


PLAN = Plan(Generation(1), ((0, 1), (1, 2)), ((A, B), (A, B)), A, shadows=((), (A,)))


def ready(stage: int, slot: int, losses: tuple[float, ...] = ()) -> Ready:
    shadow = slot == 2
    owned = () if shadow else tuple(range(slot, 4, 2))
    update = BlobRef(f"{stage}" * 64, 1)
    at = SlotId(stage, slot)
    squares = ((stage, 9.0 + 7.0 * stage),)
    return Ready(manifest().job, Generation(1), 3, at, owned, update, squares, losses)


def test_a_step_is_the_same_from_one_ready_of_each_stage_as_from_all() -> None:
    votes, few = Votes(), Votes()
    for stage in (0, 1):
        for slot in (0, 1):
            losses = (2.0 + slot, 4.0 + slot) if stage == 1 else ()
            votes.add(ready(stage, slot, losses))
    votes.add(ready(1, 2))
    few.add(ready(0, 1))
    few.add(ready(1, 1, (3.0, 5.0)))
    whole, part = votes.commit(3, PLAN, manifest()), few.commit(3, PLAN, manifest())
    assert (whole.loss, part.loss) == (3.5, 4.0), "the mean of what is known"
    assert replace(part, loss=whole.loss) == whole
    assert whole.scale == pytest.approx(0.2)


def test_a_loss_that_nobody_knows_is_none_at_all_and_shown_as_the_one_before() -> None:
    votes = Votes()
    votes.add(ready(0, 0))
    votes.add(ready(1, 2))
    assert math.isnan(votes.commit(3, PLAN, manifest()).loss)
    progress = Progress(manifest(), 0.0)
    for step, loss in enumerate((math.nan, 3.0, math.nan, 2.0)):
        progress.committed(step, loss, None)
    assert progress.shown_losses == (3.0, 3.0, 3.0, 2.0)
    progress.rewind(1)
    assert progress.shown_losses == ()


def test_a_holder_of_a_plan_that_never_began_follows_once_a_majority_does() -> None:
    first = trained(2)
    first.forget_messages()
    holder, plan = others_at(first, 1)[0], first.ledger.plan
    assert plan is not None
    for peer in set(plan.holders(1)) - {holder}:
        first.workers[peer].stages.pop(1)
        first.workers[peer].logs.pop(1)
    worker = first.workers[holder]
    worker.promised, worker.promised_to, worker.adopted = 3, "z", 3
    second = successor(first, "a").start()
    second.run()
    assert second.commits() == list(range(STEPS)), "nothing is given up"
    insisted = [s for s in second.sent if isinstance(s.message, Inquire) and s.message.is_agreed]
    assert [s.peer for s in insisted] == [holder]


def test_a_stage_that_is_lost_is_given_up_although_somebody_refuses_for_ever() -> None:
    first = trained(3)
    first.forget_messages()
    for peer in others_at(first, 1):
        first.workers[peer].stages, first.workers[peer].logs = {}, {}
        first.workers[peer].adopted = 10**9  # it grants nothing, whatever the number
    plan = first.ledger.plan
    assert plan is not None
    if A in plan.holders(1):
        first.workers[A].stages.pop(1, None)
        first.workers[A].logs.pop(1, None)
    second = successor(first, "a").start()
    started_s = second.now_s
    while "a stage is lost" not in second.ledger.reason and second.now_s < 10 * SEARCH_S:
        second.next() if second.inbox else second.tick(1.0)
    assert "a stage is lost; back to step 0" in second.ledger.reason
    assert SEARCH_S <= second.now_s - started_s < 2 * SEARCH_S


def reading(step: int) -> tuple[Bench, list[PeerId]]:
    """Who coordinates has been started again, and so have all holders of a stage: they are here,
    and read what is on their disks."""
    first = trained(step)
    first.forget_messages()
    plan = first.ledger.plan
    assert plan is not None
    stage = next(s for s in range(plan.num_stages) if A not in plan.holders(s))
    again, holders = successor(first, "a"), sorted(set(plan.holders(stage)))
    for peer in holders:
        again.workers[peer].is_reading = True
    return again.start(), holders


def wait(bench: Bench, saying: list[PeerId], seconds: float) -> None:
    """Time passes, in which these say each second that they read."""
    until_s = bench.now_s + seconds
    while bench.now_s < until_s and "a stage is lost" not in bench.ledger.reason:
        while bench.inbox:
            bench.next()
        for peer in saying:
            bench.feed(on.Heard(peer, Checking(bench.ledger.job)))
        bench.tick(1.0)


def test_steps_are_not_given_up_while_their_holders_read_what_they_have() -> None:
    bench, holders = reading(3)
    wait(bench, holders, 20 * SEARCH_S)
    assert "a stage is lost" not in bench.ledger.reason
    assert bench.ledger.step == 3
    num_asked = sum(isinstance(s.message, Inquire) and s.peer == holders[0] for s in bench.sent)
    assert num_asked == 1, "who reads need not be asked again"
    for peer in holders:
        bench.workers[peer].is_reading = False
    bench.run()
    assert bench.commits() == list(range(STEPS))
    assert histories(bench) == {tuple(range(STEPS))}
    assert min(computed(bench)) == 3, "nothing was computed again"


@pytest.mark.parametrize(("num_saying", "patience_s"), [(0, SEARCH_S), (1, CHECK_S)])
def test_who_reads_is_waited_for_while_it_says_so_and_not_for_ever(
    num_saying: int, patience_s: float
) -> None:
    bench, holders = reading(3)
    for silent in holders[num_saying:]:
        del bench.workers[silent]
    started_s = bench.now_s
    wait(bench, holders[:num_saying], 2 * CHECK_S)
    assert "a stage is lost; back to step" in bench.ledger.reason
    assert patience_s <= bench.now_s - started_s < patience_s + 2


@pytest.mark.parametrize(
    ("step_s", "patience_s"), [(0.1, SEARCH_S), (30.0, 90.0), (1e6, MAX_SEARCH_S)]
)
def test_what_took_longer_to_compute_is_looked_for_longer(step_s: float, patience_s: float) -> None:
    bench, holders = reading(3)
    assert bench.ledger.plan is not None
    bench.ledger.plan = replace(bench.ledger.plan, predicted_step_s=step_s)
    assert (bench.ledger.step, bench.ledger.checkpoint) == (3, None)
    for peer in holders:
        del bench.workers[peer]
    started_s = bench.now_s
    wait(bench, [], 2 * MAX_SEARCH_S)
    assert "a stage is lost; back to step 0" in bench.ledger.reason
    assert patience_s <= bench.now_s - started_s < patience_s + 2


def test_who_is_behind_for_long_makes_room_for_those_who_know_more() -> None:
    first = trained(3)
    first.forget_messages()
    for peer, worker in first.workers.items():
        if peer != B:
            worker.adopted, worker.promised, worker.promised_to = 10**6, 10**6, "z"
            worker.in_touch = False
    second = successor(first).start()
    started_s = second.now_s
    while second.ledger.phase != "handed over" and second.now_s < 10 * SEARCH_S:
        second.next() if second.inbox else second.tick(1.0)
    assert second.ledger.successor == "z"
    assert SEARCH_S <= second.now_s - started_s < SEARCH_S + 5
