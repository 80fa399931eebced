"""Holders of a stage that hold different weights: nothing committed is given up for it."""

import dataclasses
from collections.abc import Callable, Collection

import pytest

from swarmnode.coordinator import events as on
from swarmnode.coordinator.disputes import Disputes
from swarmnode.domain import Generation, JobId, PeerId, SlotId
from swarmnode.messages import Applied, Assign, Failed
from tests.coordinator.bench import Bench, histories, manifest

STEPS = 30
LOGGED = 12
"""Updates that holders keep: their logs reach back to no checkpoint."""


def forget_old_updates(bench: Bench) -> None:
    for worker in bench.workers.values():
        for log in worker.logs.values():
            for step in [step for step in log if step < bench.ledger.step - LOGGED]:
                del log[step]


def run(
    bench: Bench,
    is_wrong: Callable[[PeerId, Applied], bool],
    until: str = "serving",
    *,
    most_s: float = 600.0,
) -> None:
    """Until that phase; of those hashes for which `is_wrong` others are heard."""
    while bench.ledger.phase != until:
        assert bench.now_s < most_s, f"{bench.ledger.phase}: {bench.ledger.reason}"
        forget_old_updates(bench)
        if not bench.inbox:
            bench.tick(1.0)
            continue
        event = bench.inbox[0]
        applied = event.message if isinstance(event, on.Heard) else None
        if isinstance(applied, Applied) and is_wrong(event.peer, applied):
            wrong = dataclasses.replace(applied, state_hash="f" * 64)
            bench.inbox[0] = on.Heard(event.peer, wrong)
        bench.next()


def job(names: str = "abcd", *, slots: int = 2) -> Bench:
    return Bench(manifest(steps=STEPS, checkpoint_every=0, slots=slots), names).start()


def partners(bench: Bench, stage: int) -> list[PeerId]:
    assert bench.ledger.plan is not None
    return sorted(set(bench.ledger.plan.holders(stage)))


def sources(bench: Bench, stage: int) -> dict[PeerId, str]:
    """How each holder of a stage got it last."""
    told = {
        sent.peer: dict(sent.message.sources)[stage].how
        for sent in bench.sent
        if isinstance(sent.message, Assign)
        and sent.message.plan.generation == bench.ledger.generation
        and stage in dict(sent.message.sources)
    }
    return dict(sorted(told.items()))


def test_who_differs_once_gets_the_state_of_the_other_and_no_step_is_given_up() -> None:
    bench = job()
    lies: list[PeerId] = []

    def is_wrong(peer: PeerId, applied: Applied) -> bool:
        stage_partners = partners(bench, 1)
        if applied.step == 20 and applied.stage == 1 and peer == stage_partners[-1] and not lies:
            lies.append(peer)
        return lies == [peer] and applied.step == 20 and applied.stage == 1

    run(bench, is_wrong)
    assert lies
    assert bench.commits() == list(range(STEPS)), "no step was given up, or done twice"
    how = sources(bench, 1)
    assert how.pop(lies[0]) == "fetch"
    assert set(how.values()) == {"keep"}
    assert histories(bench) == {tuple(range(STEPS))}


def test_where_the_log_reaches_back_both_are_derived_from_it() -> None:
    """The negative control of the one above: the log can tell who is right."""
    bench = Bench(manifest(steps=STEPS, checkpoint_every=10), "abcd").start()
    lies: list[int] = []

    def is_wrong(peer: PeerId, applied: Applied) -> bool:
        is_it = applied.step == 12 and applied.stage == 1 and peer == partners(bench, 1)[-1]
        if is_it and not lies:
            lies.append(applied.step)
            return True
        return False

    run(bench, is_wrong)
    assert lies
    assert bench.commits() == list(range(STEPS))
    assert "keep" not in sources(bench, 1).values()


def test_who_computes_other_bits_again_and_again_gets_no_more_work_until_it_is_started_again() -> (
    None
):
    bench = job()
    odd = partners_once_placed(bench)[-1]
    run(bench, lambda peer, applied: peer == odd and applied.step > 5)
    assert bench.commits() == list(range(STEPS))
    assert not bench.ledger.is_worker(odd)
    assert bench.ledger.generation < 8, "it was tried a few times, not at each step"
    assert odd not in {advert.peer for advert in bench.ledger.pool.usable(bench.now_s + 1e6)}
    again = dataclasses.replace(bench.adverts[odd], incarnation=2)
    bench.ledger.pool.see([again], bench.now_s)
    assert [advert.peer for advert in bench.ledger.pool.usable(bench.now_s)] == [odd]


def partners_once_placed(bench: Bench) -> list[PeerId]:
    bench.run(until="training")
    return [peer for peer in partners(bench, 1) if peer != bench.ledger.me]


def said(disputes: Disputes, told: Collection[tuple[str, str]]) -> list[PeerId | None]:
    return [
        disputes.applied(PeerId(peer), Applied(JobId("j"), Generation(1), 3, 0, state_hash))
        for peer, state_hash in told
    ]


@pytest.mark.parametrize(
    ("told", "odd"),
    [
        ("ax bx cx", ""),
        ("ax by", "b"),
        ("ax by cy", "a"),
        ("ax by cx", "b"),
        ("ax bx cy dy", "cd"),
        ("ax by cz", "bc"),
    ],
)
def test_the_odd_one_is_who_differs_from_most(told: str, odd: str) -> None:
    disputes = Disputes()
    said(disputes, [(word[0], word[1]) for word in told.split()])
    assert disputes.odd.get(0, frozenset()) == set(odd)
    disputes.assigned()
    assert disputes.odd.get(0, frozenset()) == set(odd), "until all have got what counts"
    assert disputes.settled() == []
    assert not disputes.odd


def test_the_second_time_counts_and_then_it_is_forgotten() -> None:
    disputes = Disputes()
    told: list[list[PeerId]] = []
    for _ in range(4):
        said(disputes, [("a", "x"), ("b", "y")])
        disputes.assigned()
        told.append(disputes.settled())
    assert told == [[], ["b"], [], ["b"]]


# ---- values that are not finite ----------------------------------------------------------------


def fail_at(bench: Bench, step: int, *, most_s: float = 600.0) -> list[PeerId]:
    """Whoever has slot 0 of the last stage fails at that step, each time; who did."""
    failed: list[PeerId] = []
    generation = Generation(0)
    adverts = bench.adverts.values()
    while bench.ledger.phase not in ("failed", "serving"):
        if bench.now_s > most_s:
            break
        plan, ledger = bench.ledger.plan, bench.ledger
        is_there = ledger.phase == "training" and ledger.step == step
        if is_there and plan is not None and ledger.generation > generation:
            generation = ledger.generation
            failed.append(plan.slots[-1][0])
            bench.forget_messages()
            word = "int8 cannot code it: a value is not finite"
            message = Failed(ledger.job, generation, word, is_diverged=True)
            bench.feed(on.Heard(failed[-1], message))
        elif bench.inbox:
            bench.next()
        else:
            bench.tick(1.0)
            seen = [dataclasses.replace(a, expires_at_s=bench.now_s) for a in adverts]
            bench.feed(on.PeersSeen(tuple(seen)))
    return failed


@pytest.mark.parametrize(("names", "peers"), [("ab", 1), ("ab", 2), ("abc", 2)])
def test_values_that_are_not_finite_twice_in_the_same_step_end_the_job(
    names: str, peers: int
) -> None:
    bench = Bench(manifest(steps=STEPS, peers=peers), names).start()
    failed = fail_at(bench, 2)
    assert len(failed) == 2
    assert bench.ledger.phase == "failed"
    assert bench.ledger.reason.startswith("step 2: ")
    assert "optimizer.learning_rate" in bench.ledger.reason


def test_a_value_that_is_not_finite_on_one_machine_alone_costs_it_its_slots_and_no_more() -> None:
    bench = Bench(manifest(steps=STEPS), "abc").start()
    bench.run(until="training")
    assert bench.ledger.plan is not None
    culprit = bench.ledger.plan.slots[-1][0]
    bench.forget_messages()
    message = Failed(bench.ledger.job, bench.ledger.generation, "not finite", is_diverged=True)
    bench.feed(on.Heard(culprit, message))
    bench.run()
    assert bench.commits() == list(range(STEPS))


def test_for_a_change_that_follows_from_nothing_nobody_loses_its_slots_at_first() -> None:
    """The history may be wrong on either end; the second time in a row, there is none."""
    bench = Bench(manifest(steps=STEPS), "abcd").start()
    bench.run(until="training")
    before = bench.ledger.plan
    assert before is not None
    (reporter, culprit), failures = (before.slots[0][0], before.slots[1][0]), []
    for _ in range(2):
        bench.run(until="training")
        plan = bench.ledger.plan
        assert plan is not None
        bench.forget_messages()
        said = Failed(
            bench.ledger.job, plan.generation, "does not follow",
            blames=SlotId(1, 0), is_mismatch=True,
        )  # fmt: skip
        bench.feed(on.Heard(reporter, said))
        failures.append((plan.slots, bench.ledger.pool.usable(bench.now_s)))
    (_, after_first), (slots, after_second) = failures
    assert slots == before.slots, "the next generation has the same hosts"
    assert {reporter, culprit} <= {advert.peer for advert in after_first}
    assert {reporter} == {reporter, culprit} & {advert.peer for advert in after_second}
    bench.run()
    assert bench.commits() == list(range(STEPS))
