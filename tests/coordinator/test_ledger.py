"""The ledger against obedient workers that are killed at every possible moment."""

import dataclasses

import pytest

from swarmnode.coordinator import events as on
from swarmnode.coordinator.solver.fill import solve
from swarmnode.coordinator.solver.request import Improvement
from swarmnode.domain import Generation, PeerId
from swarmnode.messages import Assign, Commit, Failed, LinkBroken, Ready
from tests.coordinator.bench import BLOB, Bench, advert, manifest

STEPS = 5


def histories(bench: Bench) -> set[tuple[int, ...]]:
    return {history for worker in bench.workers.values() for history in worker.stages.values()}


def test_an_undisturbed_job_commits_each_step_once_and_serves() -> None:
    bench = Bench(manifest(steps=STEPS), "abcd").start()
    bench.run()
    assert bench.commits() == list(range(STEPS))
    assert histories(bench) == {tuple(range(STEPS))}
    assert bench.ledger.checkpoint is not None
    assert bench.ledger.checkpoint.step == STEPS
    assert bench.ledger.progress.losses == [2.5] * STEPS
    assert bench.ledger.progress.validation[-1] == (STEPS, 2.5)


def count_events() -> int:
    bench = Bench(manifest(steps=STEPS), "abcd").start()
    for number in range(10_000):
        if bench.ledger.phase == "serving":
            return number
        bench.next()
    raise AssertionError("never served")


@pytest.mark.parametrize("victim", ["b", "c", "d"])
def test_a_worker_killed_after_any_event_loses_no_step_and_repeats_none(victim: str) -> None:
    for moment in range(count_events()):
        bench = Bench(manifest(steps=STEPS), "abcd").start()
        for _ in range(moment):
            bench.next()
        bench.kill(victim)
        bench.run()
        assert bench.commits() == list(range(STEPS)), f"killed after {moment} events"
        assert histories(bench) == {tuple(range(STEPS))}


def test_when_a_stage_is_lost_for_good_the_job_goes_back_to_the_checkpoint() -> None:
    bench = Bench(manifest(slots=1, steps=STEPS, checkpoint_every=2), "abc").start()
    while bench.ledger.step < 3 or bench.ledger.checkpoint is None:
        bench.next()
    plan = bench.ledger.plan
    assert plan is not None
    victim = next(row[0] for row in plan.slots if row[0] != "a")
    bench.kill(victim)
    bench.run()
    assert histories(bench) == {tuple(range(STEPS))}
    assert bench.commits() == [0, 1, 2, 2, 3, 4], "steps after the checkpoint are done again"
    assert len(bench.ledger.progress.losses) == STEPS


def test_a_message_of_an_older_generation_changes_nothing() -> None:
    bench = Bench(manifest(steps=STEPS), "abcd").start()
    while not any(isinstance(e, on.Heard) and isinstance(e.message, Ready) for e in bench.inbox):
        bench.next()
    late = [e for e in bench.inbox if isinstance(e, on.Heard) and isinstance(e.message, Ready)]
    bench.kill("d")
    while bench.ledger.phase != "training":
        bench.next()
    before = bench.commits()
    for event in late * 3:
        bench.feed(event)
    assert bench.commits() == before
    bench.run()
    assert bench.commits() == list(range(STEPS))


def test_gradients_that_differ_within_a_stage_are_not_committed() -> None:
    bench = Bench(manifest(steps=1), "abcd").start()
    while bench.ledger.phase != "training":
        bench.next()
    first = bench.inbox.popleft()
    assert isinstance(first, on.Heard)
    assert isinstance(first.message, Ready)
    bench.inbox.appendleft(
        on.Heard(first.peer, dataclasses.replace(first.message, digest="cd" * 8))
    )
    generation = bench.ledger.generation
    while bench.ledger.generation == generation:
        bench.next()
    assert bench.commits() == []
    bench.run()
    assert bench.commits() == [0]


def test_a_slot_that_counted_a_microbatch_twice_is_not_committed() -> None:
    bench = Bench(manifest(steps=1), "abcd").start()
    while bench.ledger.phase != "training":
        bench.next()
    first = bench.inbox.popleft()
    assert isinstance(first, on.Heard)
    assert isinstance(first.message, Ready)
    twice = (*first.message.microbatches, first.message.microbatches[0])
    bench.inbox.appendleft(
        on.Heard(first.peer, dataclasses.replace(first.message, microbatches=twice))
    )
    generation = bench.ledger.generation
    while bench.ledger.generation == generation:
        bench.next()
    assert bench.commits() == []
    assert "counted" in bench.ledger.reason


def test_a_peer_cannot_vote_for_a_slot_that_it_does_not_host() -> None:
    bench = Bench(manifest(steps=1), "abcd").start()
    while bench.ledger.phase != "training":
        bench.next()
    votes = [bench.inbox.popleft() for _ in range(4)]
    stranger = votes[0]
    assert isinstance(stranger, on.Heard)
    for event in votes[1:]:
        assert isinstance(event, on.Heard)
        bench.feed(on.Heard(stranger.peer, event.message))
    bench.feed(stranger)
    assert bench.commits() == []


def test_too_few_peers_wait_and_go_on_when_one_comes() -> None:
    bench = Bench(manifest(steps=STEPS, peers=3), "abc").start()
    while bench.ledger.step < 2:
        bench.next()
    bench.kill("c")
    assert bench.ledger.phase == "waiting"
    assert "2 of 3 peers" in bench.ledger.reason
    newcomer = advert("e")
    bench.adverts = {p: a for p, a in bench.adverts.items() if p != "c"} | {newcomer.peer: newcomer}
    bench.workers[newcomer.peer] = type(bench.workers[PeerId("a")])(newcomer.peer, bench.job.batch)
    bench.start()
    bench.run()
    assert bench.commits() == list(range(STEPS))
    assert histories(bench) == {tuple(range(STEPS))}


def with_a_newcomer(names: str, *, move_s: float = 0.0, settled_s: float = 10.0) -> Bench:
    """A job on `names` in which somebody new arrives after the first step."""
    bench = Bench(manifest(steps=STEPS), names).start()
    bench.move_s = move_s
    while bench.ledger.step < 1:
        bench.next()
    newcomer = advert("e")
    bench.adverts[newcomer.peer] = newcomer
    bench.workers[newcomer.peer] = type(bench.workers[PeerId("a")])(newcomer.peer, bench.job.batch)
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


def test_a_lost_peer_gets_no_work_until_its_advert_is_renewed() -> None:
    bench = Bench(manifest(steps=STEPS), "abcd").start()
    bench.kill("d")
    late = advert("d", until_s=2e9)
    bench.adverts[late.peer] = late
    bench.start()  # sent before the loss, seen after it
    bench.run()
    bench.now_s += 60.0
    bench.start()
    assert "d" not in bench.ledger.plan.workers() if bench.ledger.plan else False
    bench.workers[late.peer] = type(bench.workers[PeerId("a")])(late.peer, bench.job.batch)
    bench.adverts[late.peer] = advert("d", until_s=3e9)
    bench.start()
    bench.tick(10.0)
    while bench.inbox:
        bench.next()
    assert bench.ledger.plan is not None
    assert "d" in bench.ledger.plan.workers()


def test_a_broken_link_between_live_workers_begins_the_step_again() -> None:
    bench = Bench(manifest(steps=STEPS), "abcd").start()
    while bench.ledger.phase != "training":
        bench.next()
    bench.inbox.clear()
    ledger = bench.ledger
    broken = LinkBroken(ledger.job, ledger.generation, PeerId("c"), "reset")
    bench.feed(on.Heard(PeerId("b"), broken))
    bench.feed(on.Tick())
    assert ledger.generation == Generation(1), "one of the ends may be found dead meanwhile"
    bench.now_s += 3.0
    bench.feed(on.Tick())
    bench.run()
    assert ledger.generation == Generation(2)
    assert bench.commits() == list(range(STEPS))


def fail(bench: Bench, name: str) -> None:
    bench.inbox.clear()
    failure = Failed(bench.ledger.job, bench.ledger.generation, "out of memory")
    bench.feed(on.Heard(PeerId(name), failure))


def test_a_worker_that_fails_again_and_again_is_replaced_and_the_job_goes_on() -> None:
    bench = Bench(manifest(steps=STEPS), "abcd").start()
    for _ in range(20):
        if bench.ledger.plan is not None and "b" in bench.ledger.plan.workers():
            fail(bench, "b")
    assert bench.ledger.phase == "placing"
    bench.run()
    assert bench.commits() == list(range(STEPS))


def test_a_job_that_nobody_can_do_fails_with_the_reason() -> None:
    bench = Bench(manifest(steps=STEPS), "abcd").start()
    for moment in range(200):
        if bench.ledger.is_over:
            break
        bench.now_s += 20.0
        bench.adverts = {p: advert(p, until_s=1e9 + moment) for p in bench.adverts}
        bench.start()
        for name in "abcd":
            if bench.ledger.plan is not None and name in bench.ledger.plan.workers():
                fail(bench, name)
    assert bench.ledger.phase == "failed"
    assert "out of memory" in bench.ledger.reason


def test_impossible_numbers_from_a_worker_cost_that_worker_its_place_not_the_job() -> None:
    for change in (
        {"sums_of_squares": ((0, -1.0),)},
        {"sums_of_squares": ((0, float("nan")),)},
        {"losses": (float("inf"), float("-inf"))},
    ):
        bench = Bench(manifest(steps=1), "abcd").start()
        while bench.ledger.phase != "training":
            bench.next()
        first = bench.inbox.popleft()
        assert isinstance(first, on.Heard)
        assert isinstance(first.message, Ready)
        bench.inbox.append(on.Heard(first.peer, dataclasses.replace(first.message, **change)))
        bench.run()
        assert bench.commits() == [0], change


def test_a_link_that_breaks_again_costs_an_end_its_place() -> None:
    bench = Bench(manifest(steps=STEPS), "abcd").start()
    for _ in range(3):
        while bench.ledger.phase != "training":
            bench.next()
        plan = bench.ledger.plan
        assert plan is not None
        if not {"b", "c"} <= set(plan.workers()):
            break
        bench.inbox.clear()
        broken = LinkBroken(bench.ledger.job, bench.ledger.generation, PeerId("c"), "reset")
        bench.feed(on.Heard(PeerId("b"), broken))
        bench.now_s += 3.0
        bench.feed(on.Tick())
    else:
        raise AssertionError("b and c are still asked to work together")
    bench.run()
    assert bench.commits() == list(range(STEPS))


def test_a_checkpoint_is_complete_only_with_the_states_that_were_named() -> None:
    bench = Bench(manifest(slots=1, steps=STEPS), "abc").start()
    while not any(isinstance(e, on.StateStored) for e in bench.inbox):
        bench.next()
    stored = [e for e in bench.inbox if isinstance(e, on.StateStored)]
    wrong = dataclasses.replace(stored[0], index=BLOB)
    bench.feed(wrong)
    bench.feed(dataclasses.replace(wrong, stage=1 - wrong.stage))
    assert bench.ledger.checkpoint is None
    bench.run()
    assert bench.ledger.checkpoint is not None
    assert len(bench.ledger.checkpoint.indexes) == 2


def test_a_restarted_coordinator_goes_on_from_the_checkpoint_with_a_higher_generation() -> None:
    first = Bench(manifest(steps=STEPS, checkpoint_every=2), "abcd").start()
    while first.ledger.checkpoint is None:
        first.next()
    second = Bench(manifest(steps=STEPS, checkpoint_every=2), "abcd", records=first.journal)
    second.published = first.published
    second.start()
    assert second.ledger.generation > first.ledger.generation
    assert second.ledger.step == first.ledger.checkpoint.step
    second.run()
    assert histories(second) == {tuple(range(STEPS))}
    assert second.ledger.progress.losses == [2.5] * STEPS


def test_the_commit_is_in_the_journal_before_any_worker_hears_of_it() -> None:
    bench = Bench(manifest(steps=1), "abcd").start()
    while bench.ledger.phase != "training":
        bench.next()
    votes = [bench.inbox.popleft() for _ in range(4)]
    for event in votes[:3]:
        bench.feed(event)
    effects = bench.ledger.handle(votes[3], bench.now_s)
    kinds = [
        type(e.record) if isinstance(e, on.Write) else type(getattr(e, "message", e))
        for e in effects
    ]
    assert kinds.index(on.CommitRecord) < kinds.index(Commit)


def test_a_stopped_job_releases_its_workers_and_never_moves_again() -> None:
    bench = Bench(manifest(steps=STEPS), "abcd").start()
    while bench.ledger.step < 1:
        bench.next()
    bench.feed(on.StopAsked("enough"))
    assert bench.ledger.phase == "stopped"
    assert all(not worker.stages for worker in bench.workers.values())
    bench.start()
    assert not any(isinstance(s.message, Assign) for s in bench.sent[-4:])
    restored = Bench(manifest(steps=STEPS), "abcd", records=bench.journal)
    assert restored.ledger.is_over
