"""What follows when a job makes no progress although all who work for it are alive."""

from collections import deque

from swarmnode.coordinator import events as on
from swarmnode.coordinator.patience import PATIENCE_S
from swarmnode.domain import PeerId
from swarmnode.messages import Placed, Traffic
from tests.coordinator.bench import Bench, manifest

STEPS = 5


def placing() -> Bench:
    """All have been told their parts; none has answered yet."""
    bench = Bench(manifest(steps=STEPS), "abcd").start()
    while bench.ledger.plan is None:
        bench.next()
    assert bench.ledger.phase == "placing"
    return bench


def say_placed(bench: Bench, silent: set[PeerId]) -> None:
    """Deliver what there is, but nothing of the silent ones."""
    while bench.inbox:
        event = bench.inbox[0]
        if isinstance(event, on.Heard) and event.peer in silent:
            assert isinstance(event.message, Placed)
            bench.inbox.popleft()
        else:
            bench.next()


def usable(bench: Bench) -> set[PeerId]:
    return {advert.peer for advert in bench.ledger.pool.usable(bench.now_s)}


def test_who_alone_never_took_its_part_does_not_get_it_again_at_once() -> None:
    bench = placing()
    assert bench.ledger.plan is not None
    victim = next(p for p in sorted(bench.ledger.plan.workers(), reverse=True) if p != "a")
    say_placed(bench, {victim})
    assert bench.ledger.phase == "placing"
    bench.tick(PATIENCE_S["placing"] + 1)
    assert usable(bench) == bench.adverts.keys() - {victim}
    bench.run()
    assert victim not in bench.ledger.plan.workers()
    assert bench.commits() == list(range(STEPS))


def test_where_nobody_took_a_part_nobody_is_barred() -> None:
    bench = placing()
    assert bench.ledger.plan is not None
    say_placed(bench, set(bench.ledger.plan.workers()))
    bench.tick(PATIENCE_S["placing"] + 1)
    assert usable(bench) == bench.adverts.keys()
    bench.run()
    assert bench.commits() == list(range(STEPS))


def test_a_step_that_does_not_end_bars_nobody() -> None:
    """Who holds it up, nobody knows; all had taken their parts."""
    bench = Bench(manifest(steps=STEPS), "abcd").start()
    bench.run(until="training")
    bench.forget_messages()
    bench.tick(PATIENCE_S["training"] + 1)
    assert usable(bench) == bench.adverts.keys()
    bench.run()
    assert bench.commits() == list(range(STEPS))


def test_a_step_whose_tensors_are_still_on_their_way_is_not_begun_again() -> None:
    """Over a slow line an exchange may take far longer than any computing."""
    bench = Bench(manifest(steps=STEPS), "abcd").start()
    bench.run(until="training")
    assert bench.ledger.plan is not None
    before, (worker, *_) = bench.ledger.generation, bench.ledger.plan.workers()
    under_way, bench.inbox = bench.inbox, deque()
    for _ in range(30):
        bench.feed(on.Heard(worker, Traffic(bench.ledger.job, {}, 0.0, is_moving=True)))
        bench.tick(PATIENCE_S["training"] / 2)
    assert bench.ledger.generation == before
    bench.feed(on.Heard(worker, Traffic(bench.ledger.job, {}, 0.0)))
    bench.inbox = under_way
    bench.run()
    assert bench.commits() == list(range(STEPS))
    assert bench.ledger.generation == before, "the same step ended after half an hour"
