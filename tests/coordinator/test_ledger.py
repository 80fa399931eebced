"""The ledger against obedient workers that are killed at every possible moment."""

import dataclasses

import pytest

from swarmnode.coordinator import events as on
from swarmnode.domain import BlobRef, Generation, PeerId, SlotId
from swarmnode.messages import (
    Answer,
    Assign,
    Begin,
    Commit,
    Failed,
    LinkBroken,
    Ready,
)
from tests.coordinator.bench import BLOB, Bench, Worker, advert, histories, manifest

STEPS = 5


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


def test_where_one_machine_hosts_a_stage_another_shadows_it_and_takes_over() -> None:
    for victim in "bc":
        bench = Bench(manifest(slots=1, steps=STEPS), "abc").start()
        while bench.ledger.step < 3:
            bench.next()
        plan = bench.ledger.plan
        assert plan is not None
        assert all(len(set(plan.holders(stage))) == 2 for stage in range(plan.num_stages))
        bench.kill(victim)
        bench.run()
        assert histories(bench) == {tuple(range(STEPS))}
        assert bench.commits() == list(range(STEPS)), "nothing is computed twice"


def test_a_stage_that_nobody_has_any_more_is_looked_for_and_then_the_checkpoint_must_do() -> None:
    bench = Bench(manifest(slots=1, steps=STEPS, checkpoint_every=2), "abc").start()
    while bench.ledger.step < 3 or bench.ledger.checkpoint is None:
        bench.next()
    plan = bench.ledger.plan
    assert plan is not None
    stage = next(s for s in range(2) if "a" not in plan.holders(s))
    for victim in plan.holders(stage):
        bench.kill(victim)
    for _ in range(5):
        bench.tick(1.0)
    assert bench.ledger.phase == "placing", "one of three nodes decides nothing alone"
    bench.forget_messages()
    for victim in plan.holders(stage):
        bench.revive(victim)
    while not bench.ledger.reason.startswith("nobody here has stage"):
        bench.next() if bench.inbox else bench.tick(1.0)
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


@pytest.mark.parametrize("is_update", [True, False], ids=["another gradient", "counted twice"])
def test_what_cannot_be_true_is_not_committed(is_update: bool) -> None:
    bench = Bench(manifest(steps=1), "abcd").start()
    while bench.ledger.phase != "training":
        bench.next()
    wrong = {"update": BlobRef("cd" * 32, 1)} if is_update else {"microbatches": (0, 2, 0)}
    bench.say_ready(**wrong)
    while not bench.ledger.reason:
        bench.next()
    assert bench.commits() == []
    assert ("another gradient" if is_update else "counted") in bench.ledger.reason
    bench.run()
    assert bench.commits() == [0]


def test_a_step_that_all_had_ready_is_committed_although_its_coordinator_died() -> None:
    first = Bench(manifest(steps=STEPS), "abcd").start()
    while first.ledger.phase != "training" or first.ledger.step < 2:
        first.next()
    assert all(worker.ready for worker in first.workers.values())
    second = Bench(manifest(steps=STEPS), "abcd", records=first.journal)
    second.workers, second.published = first.workers, first.published
    began = sum(isinstance(s.message, Begin) for s in first.sent)
    second.start()
    second.run()
    assert second.commits() == list(range(STEPS))
    steps = [s.message.step for s in second.sent if isinstance(s.message, Begin)]
    assert began
    assert min(steps) == 3, "step 2 was ready everywhere: nobody computes it again"


def test_a_commit_that_some_workers_missed_reaches_them_with_the_next_generation() -> None:
    first = Bench(manifest(steps=STEPS), "abcd").start()
    while first.ledger.step < 2:
        first.next()
    plan = first.ledger.plan
    assert plan is not None
    late = first.workers[plan.slots[0][0]]
    for stage, history in late.stages.items():  # the commit of step 1 never arrived there
        late.stages[stage] = history[:1]
    second = Bench(manifest(steps=STEPS), "abcd", records=first.journal)
    second.workers, second.published = first.workers, first.published
    second.forget_messages()
    second.start()
    second.run()
    assert second.commits() == list(range(STEPS))
    assert histories(second) == {tuple(range(STEPS))}


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
    bench.workers[newcomer.peer] = Worker(newcomer.peer, bench.job)
    bench.start()
    bench.run()
    assert bench.commits() == list(range(STEPS))
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
    bench.workers[late.peer] = Worker(late.peer, bench.job)
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
    bench.forget_messages()
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
    """Once a generation has begun with `name`, it cannot do its part."""
    peer = PeerId(name)
    for _ in range(50):
        is_open = any(
            isinstance(e, on.Heard) and isinstance(e.message, Answer) for e in bench.inbox
        )
        if bench.ledger.is_over or not (is_open or bench.ledger.phase == "waiting"):
            break
        bench.next() if bench.inbox else bench.tick(1.0)
    plan = bench.ledger.plan
    if plan is not None and peer in plan.workers():
        bench.forget_messages()
        failure = Failed(bench.ledger.job, bench.ledger.generation, "out of memory")
        bench.feed(on.Heard(peer, failure))


def test_a_worker_that_fails_again_and_again_is_replaced_and_the_job_goes_on() -> None:
    bench = Bench(manifest(steps=STEPS), "abcd").start()
    for _ in range(20):
        fail(bench, "b")
    bench.run()
    assert bench.commits() == list(range(STEPS))


def test_who_is_blamed_for_a_failure_is_who_loses_its_slots() -> None:
    bench = Bench(manifest(steps=STEPS), "abcd").start()
    bench.run(until="training")
    plan = bench.ledger.plan
    assert plan is not None
    reporter, culprit = plan.slots[0][0], plan.slots[1][0]
    assert reporter != culprit
    bench.forget_messages()
    said = Failed(bench.ledger.job, bench.ledger.generation, "not finite", blames=SlotId(1, 0))
    bench.feed(on.Heard(reporter, said))
    assert bench.ledger.reason.startswith(f"{culprit}: not finite")


def test_a_job_that_nobody_can_do_fails_with_the_reason() -> None:
    bench = Bench(manifest(steps=STEPS), "abcd").start()
    for moment in range(200):
        if bench.ledger.is_over:
            break
        bench.now_s += 20.0
        bench.adverts = {p: advert(p, until_s=1e9 + moment) for p in bench.adverts}
        bench.start()
        for name in "abcd":
            fail(bench, name)
    assert bench.ledger.phase == "failed"
    assert "out of memory" in bench.ledger.reason


@pytest.mark.parametrize(
    "change",
    [
        {"sums_of_squares": ((0, -1.0),)},
        {"sums_of_squares": ((0, float("nan")),)},
        {"losses": (float("inf"), float("-inf"))},
    ],
)
def test_impossible_numbers_from_a_worker_cost_that_worker_its_place_not_the_job(
    change: dict[str, object],
) -> None:
    bench = Bench(manifest(steps=1), "abcd").start()
    while bench.ledger.phase != "training":
        bench.next()
    bench.say_ready(**change)
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
        bench.forget_messages()
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


def test_where_nobody_kept_anything_a_restarted_coordinator_goes_on_from_the_checkpoint() -> None:
    first = Bench(manifest(steps=STEPS, checkpoint_every=2), "abcd").start()
    while first.ledger.checkpoint is None:
        first.next()
    second = Bench(manifest(steps=STEPS, checkpoint_every=2), "abcd", records=first.journal)
    second.published = first.published
    second.start()
    second.run()
    assert second.ledger.generation > first.ledger.generation
    assert histories(second) == {tuple(range(STEPS))}
    assert second.ledger.progress.losses == [2.5] * STEPS


def test_a_coordinator_that_a_majority_left_steps_down() -> None:
    bench = Bench(manifest(steps=STEPS), "abcd").start()
    while bench.ledger.step < 2:
        bench.next()
    bench.forget_messages()
    for name in "bcd":
        worker = bench.workers[PeerId(name)]
        worker.promised, worker.promised_to, worker.adopted = 7, "c", 7
    bench.kill("b")
    bench.forget_messages()
    again = Worker(PeerId("b"), bench.job, promised=7, promised_to="c", adopted=7)
    bench.workers[again.peer] = again
    for _ in range(60):
        bench.next() if bench.inbox else bench.tick(1.0)
        if bench.ledger.is_over:
            break
    assert bench.ledger.phase == "handed over"
    assert bench.ledger.successor == "c"
    assert bench.commits() == [0, 1], "it commits nothing any more"


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


def test_a_directory_that_knows_nobody_for_a_while_does_not_disturb_the_work() -> None:
    bench = Bench(manifest(steps=STEPS), "abcd").start()
    while bench.ledger.step < 1:
        bench.next()
    ledger = bench.ledger
    ledger.handle(on.PeersSeen(()), bench.now_s + 60.0)
    assert ledger.handle(on.Tick(), bench.now_s + 61.0) == []
    assert ledger.phase == "training"
