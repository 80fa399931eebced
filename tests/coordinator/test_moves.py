"""A better placement of a running job: when it is taken, and that nobody waits for it."""

import pytest

from swarmnode.coordinator import events as on
from swarmnode.coordinator.solver.fill import solve
from swarmnode.coordinator.solver.request import Improvement
from swarmnode.domain import Generation, PeerId
from swarmnode.handovers import Leaving
from swarmnode.messages import Assign, Commit, Prepare, Save
from tests.coordinator.bench import Bench, Worker, advert, histories, manifest

STEPS = 12


def with_a_newcomer(names: str, *, move_s: float = 0.0, settled_s: float = 10.0) -> Bench:
    """A job on `names` in which somebody new arrives after the first step."""
    bench = Bench(manifest(steps=STEPS), names).start()
    bench.move_s = move_s
    while bench.ledger.step < 1:
        bench.next()
    newcomer = advert("e")
    bench.adverts[newcomer.peer] = newcomer
    bench.workers[newcomer.peer] = Worker(newcomer.peer, bench.job)
    bench.start()
    bench.tick(settled_s)
    bench.run()
    assert bench.ledger.plan is not None
    return bench


def test_a_newcomer_takes_a_slot_from_a_peer_that_hosts_two() -> None:
    bench = with_a_newcomer("abc")
    assert PeerId("e") in bench.ledger.plan.workers()
    assert bench.commits() == list(range(STEPS))
    assert histories(bench) == {tuple(range(STEPS))}


@pytest.mark.parametrize(
    ("names", "move_s", "settled_s"),
    [("abcd", 0.0, 10.0), ("abc", 1e6, 10.0), ("abc", 0.0, 0.0)],
    ids=["no faster step", "a move that never pays", "right after another change"],
)
def test_nothing_moves_without_a_reason(names: str, move_s: float, settled_s: float) -> None:
    bench = with_a_newcomer(names, move_s=move_s, settled_s=settled_s)
    assert bench.ledger.generation == 1
    assert PeerId("e") not in bench.ledger.plan.workers()


def test_a_better_placement_found_for_an_older_generation_is_not_taken() -> None:
    bench = Bench(manifest(steps=STEPS), "abc").start()
    while bench.ledger.step < 1:
        bench.next()
    plan = bench.ledger.plan
    assert plan is not None
    found = Improvement(solve([advert("a")], bench.ledger.facts, bench.job), None, 0.0)
    bench.feed(on.Improved(Generation(plan.generation - 1), found))
    assert bench.ledger.replanning.chosen is None
    bench.feed(on.Improved(plan.generation, found))
    assert bench.ledger.replanning.chosen == found.decision


def test_a_better_placement_whose_machine_died_meanwhile_is_not_taken() -> None:
    bench = Bench(manifest(steps=STEPS), "abcd").start()
    while bench.ledger.step < 1:
        bench.next()
    assert bench.ledger.plan is not None
    decision = solve(tuple(bench.adverts.values()), bench.ledger.facts, bench.job)
    bench.feed(on.Improved(bench.ledger.plan.generation, Improvement(decision, None, 0.0)))
    bench.kill("d")
    bench.run()
    assert PeerId("d") not in bench.ledger.plan.workers()
    assert histories(bench) == {tuple(range(STEPS))}


def test_the_job_goes_on_while_a_newcomer_fetches_its_state() -> None:
    bench = with_a_newcomer("abc")
    sent = [(s.peer, type(s.message)) for s in bench.sent]
    prepared = sent.index((PeerId("e"), Prepare))
    assigned = sent.index((PeerId("e"), Assign))
    committed = [peer for peer, kind in sent[prepared:assigned] if kind is Commit]
    assert committed, "steps are committed between the two"
    saves = [s.message for s in bench.sent[:prepared] if isinstance(s.message, Save)]
    assert (PeerId("e"),) in {save.readers for save in saves}, "no plan names it yet"


def test_a_newcomer_may_ask_the_coordinator_only_while_it_prepares() -> None:
    bench = Bench(manifest(steps=STEPS), "abc").start()
    while bench.ledger.step < 1:
        bench.next()
    bench.revive("e")
    bench.tick(10.0)
    assert not bench.ledger.newcomers
    while not any(isinstance(s.message, Prepare) for s in bench.sent):
        bench.next()
    assert bench.ledger.newcomers == {PeerId("e")}
    bench.run()
    assert PeerId("e") in bench.ledger.plan.workers()
    assert not bench.ledger.newcomers


def test_a_newcomer_that_dies_while_it_prepares_changes_nothing() -> None:
    bench = Bench(manifest(steps=STEPS), "abc").start()
    while bench.ledger.step < 1:
        bench.next()
    bench.revive("e")
    bench.tick(10.0)
    while not any(isinstance(s.message, Prepare) for s in bench.sent):
        bench.next()
    bench.kill("e")
    bench.adverts.pop(PeerId("e"))
    bench.run()
    assert bench.ledger.generation == 1
    assert bench.commits() == list(range(STEPS))


def test_who_wants_to_leave_is_let_go_once_others_have_its_slots() -> None:
    bench = Bench(manifest(steps=STEPS), "abcd").start()
    while bench.ledger.step < 2:
        bench.next()
    leaver = PeerId("c")
    bench.feed(on.Heard(leaver, Leaving(bench.ledger.job, bench.ledger.generation, 1)))
    while leaver in bench.ledger.plan.workers() or bench.ledger.phase == "placing":
        bench.next() if bench.inbox else bench.tick(1.0)
    assert not bench.workers[leaver].stages, "it was released"
    bench.run()
    assert bench.commits() == list(range(STEPS))
    assert histories(bench) == {tuple(range(STEPS))}


def test_what_the_solver_found_before_somebody_left_is_not_taken() -> None:
    """It would move at once, to a placement with the leaver and without what others fetch."""
    bench = Bench(manifest(steps=STEPS), "abc").start()
    while bench.ledger.step < 1:
        bench.next()
    bench.revive("e")
    plan = bench.ledger.plan
    assert plan is not None
    everybody = tuple(bench.adverts.values())
    found = Improvement(solve(everybody, bench.ledger.facts, bench.job), None, 0.0)
    leaver = PeerId("c")
    bench.feed(on.Heard(leaver, Leaving(bench.ledger.job, plan.generation, 1)))
    chosen = bench.ledger.replanning.chosen
    assert bench.ledger.newcomers == {PeerId("e")}
    bench.feed(on.Improved(plan.generation, found))
    assert bench.ledger.replanning.chosen is chosen
    prepares = sum(isinstance(s.message, Prepare) for s in bench.sent)
    while leaver in bench.ledger.plan.workers() or bench.ledger.phase == "placing":
        bench.next() if bench.inbox else bench.tick(1.0)
    assert PeerId("e") in bench.ledger.plan.workers()
    assert sum(isinstance(s.message, Prepare) for s in bench.sent) == prepares + 1
    bench.run()
    assert histories(bench) == {tuple(range(STEPS))}


def test_after_a_loss_those_go_on_who_can_compute_at_once() -> None:
    bench = Bench(manifest(steps=STEPS), "abcd").start()
    while bench.ledger.step < 2:
        bench.next()
    plan = bench.ledger.plan
    assert plan is not None
    cold = bench.workers[plan.slots[0][0]]
    cold.is_warm = False  # its process died with all its memory, the disk has everything
    other = next(peer for peer in plan.slots[1] if peer not in (cold.peer, "a"))
    bench.kill(other)
    while bench.ledger.phase != "training":
        bench.next() if bench.inbox else bench.tick(1.0)
    assert cold.peer not in bench.ledger.plan.workers()
    bench.run()
    assert bench.commits() == list(range(STEPS))


def test_who_must_start_first_is_waited_for_where_nobody_else_has_its_stage() -> None:
    bench = Bench(manifest(steps=STEPS), "abcd").start()
    while bench.ledger.step < 2:
        bench.next()
    plan = bench.ledger.plan
    assert plan is not None
    for peer in plan.slots[0]:
        bench.workers[peer].is_warm = False
    victim = next(peer for peer in plan.slots[0] if peer != "a")
    bench.kill(victim)
    bench.run()
    assert bench.commits() == list(range(STEPS))
    assert histories(bench) == {tuple(range(STEPS))}


def test_a_stage_with_one_holder_gets_a_second_one_as_soon_as_there_is_one() -> None:
    bench = Bench(manifest(slots=1, steps=400, checkpoint_every=1000), "ab").start()
    while bench.ledger.step < 2:
        bench.next()
    bench.kill("b")
    while bench.ledger.phase != "training":
        bench.next() if bench.inbox else bench.tick(1.0)
    plan = bench.ledger.plan
    assert [plan.holders(stage) for stage in (0, 1)] == [("a",), ("a",)]
    bench.now_s += 20.0
    bench.revive("b")
    for _ in range(400):
        bench.next() if bench.inbox else bench.tick(1.0)
        if bench.ledger.generation == 2 and bench.ledger.step % 40 == 0:
            bench.tick(1.0)
    plan = bench.ledger.plan
    assert all(set(plan.holders(stage)) == {"a", "b"} for stage in (0, 1))
    assert bench.commits() == list(range(bench.ledger.step))


def test_who_leaves_although_nobody_can_replace_it_need_not_wait() -> None:
    bench = Bench(manifest(steps=STEPS, peers=2), "ab").start()
    while bench.ledger.step < 2:
        bench.next()
    leaving = on.Heard(PeerId("b"), Leaving(bench.ledger.job, bench.ledger.generation, 1))
    effects = bench.ledger.handle(leaving, bench.now_s)
    assert on.Hangup(PeerId("b")) in effects
    assert bench.ledger.phase == "waiting"
