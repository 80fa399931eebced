"""A slot that straggles begins its step again on another machine."""

import pytest

from swarmnode.coordinator import events as on
from swarmnode.coordinator.stragglers import AGAIN_S, LATE_S, LEAST_STEPS, Stragglers
from swarmnode.domain import PeerId
from swarmnode.messages import Begin, Traffic
from tests.coordinator.bench import Bench, manifest

A, B, C = map(PeerId, "abc")
USUAL_S = 1.0


def usual(stragglers: Stragglers, num_steps: int = LEAST_STEPS, step_s: float = 2.0) -> float:
    """So many steps of two workers, and the next one begins; when."""
    now_s = 0.0
    for _ in range(num_steps):
        stragglers.begins(now_s)
        for peer in (A, B):
            stragglers.computed(peer, USUAL_S)
        now_s += step_s
        stragglers.committed(now_s)
    stragglers.begins(now_s)
    return now_s


def test_who_alone_computes_far_longer_than_usual_is_found_once_the_step_is_late() -> None:
    stragglers = Stragglers()
    now_s = usual(stragglers)
    stragglers.computed(B, LATE_S)
    assert stragglers.find([A, B], now_s + LATE_S) is None, "not late yet"
    assert stragglers.find([A, B], now_s + LATE_S + 0.1) == B


def test_late_is_measured_by_what_is_usual_in_long_steps() -> None:
    stragglers = Stragglers()
    now_s = usual(stragglers, step_s=60.0)
    stragglers.computed(B, 100.0)
    assert stragglers.find([A, B], now_s + 200.0) is None
    assert stragglers.find([A, B], now_s + 241.0) == B


@pytest.mark.parametrize(("a_s", "b_s"), [(0.0, 0.0), (6.0, 20.0), (0.0, 4.9)])
def test_nobody_is_blamed_who_does_not_compute_or_is_not_alone(a_s: float, b_s: float) -> None:
    """Whoever waits or hangs computes nothing; a machine that all share slows all of them."""
    stragglers = Stragglers()
    now_s = usual(stragglers)
    stragglers.computed(A, a_s)
    stragglers.computed(B, b_s)
    assert stragglers.find([A, B], now_s + 100.0) is None


def test_nothing_is_usual_at_the_start_of_a_generation() -> None:
    stragglers = Stragglers()
    now_s = usual(stragglers, LEAST_STEPS - 1)
    stragglers.computed(B, 50.0)
    assert stragglers.find([A, B], now_s + 100.0) is None
    now_s = usual(stragglers)
    stragglers.placed()
    stragglers.begins(now_s)
    stragglers.computed(B, 50.0)
    assert stragglers.find([A, B], now_s + 100.0) is None


def test_who_had_to_go_is_left_alone_for_a_while() -> None:
    stragglers = Stragglers()
    now_s = usual(stragglers)
    stragglers.sent_away(B, now_s)
    stragglers.computed(B, 50.0)
    assert stragglers.find([A, B], now_s + AGAIN_S - 1) is None
    assert stragglers.find([A, B], now_s + AGAIN_S) == B


# ---- in a job ------------------------------------------------------------------------------------


def late(names: str, peers: int = 1) -> tuple[Bench, PeerId]:
    """A job, some steps in, of which a worker that does not coordinate straggles."""
    bench = Bench(manifest(stages=2, slots=1, steps=12, peers=peers), names)
    bench.improve = lambda request: None  # type: ignore[method-assign,assignment]
    bench.start()
    bench.run(until="training")
    plan = bench.ledger.plan
    assert plan is not None
    straggler = next(peer for peer in plan.workers() if peer != plan.coordinator)
    while bench.ledger.step < 5:
        for peer in plan.workers():
            bench.feed(on.Heard(peer, Traffic(bench.job.job, {}, 0.2)))
        target = bench.ledger.step + 1
        while bench.ledger.step < target:
            bench.next()
    while bench.inbox:
        waiting = bench.inbox.popleft()
        if not (isinstance(waiting, on.Heard) and waiting.peer == straggler):
            bench.feed(waiting)
    bench.workers[straggler].ready = ()
    for _ in range(2):
        bench.now_s += 6.0
        bench.feed(on.Heard(straggler, Traffic(bench.job.job, {}, 6.0)))
    return bench, straggler


def test_its_slots_begin_the_step_again_elsewhere_and_nothing_is_counted_twice() -> None:
    bench, straggler = late("abc")
    step, plan = bench.ledger.step, bench.ledger.plan
    assert plan is not None
    assert straggler in plan.workers()
    bench.tick(0.1)
    bench.run(until="training")
    after = bench.ledger.plan
    assert after is not None
    assert after.generation > plan.generation
    assert straggler not in {peer for row in after.slots for peer in row}
    assert bench.ledger.step == step, "nothing that was committed is given up"
    begun = [sent.message for sent in bench.sent if isinstance(sent.message, Begin)]
    assert begun[-1].step == step
    bench.run()
    assert bench.commits() == list(range(12))
    workers = [bench.workers[peer] for peer in after.workers()]
    assert {held for each in workers for held in each.stages.values()} == {tuple(range(12))}


def test_where_others_cannot_do_without_it_everybody_waits() -> None:
    bench, straggler = late("ab", peers=2)
    plan = bench.ledger.plan
    assert plan is not None
    for _ in range(20):
        bench.tick(1.0)
        bench.feed(on.Heard(straggler, Traffic(bench.job.job, {}, 1.0)))
    assert bench.ledger.plan == plan
    assert bench.ledger.phase == "training"
