"""Whoever says that it leaves is let go, whenever it says so; nothing is lost or forgotten."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from swarmnode.coordinator import events as on
from swarmnode.domain import PeerId
from swarmnode.handovers import Leaving
from swarmnode.messages import Answer, Placed, Release
from tests.coordinator.bench import Bench, histories, manifest

STEPS = 12


def leaving(bench: Bench, name: str, *, generation: int | None = None, life: int = 1) -> on.Heard:
    fence = bench.ledger.generation if generation is None else generation
    return on.Heard(PeerId(name), Leaving(bench.ledger.job, fence, life))


def trained(names: str, steps: int, **section: int) -> Bench:
    """A job that has done so many steps."""
    bench = Bench(manifest(steps=STEPS, **section), names).start()
    while bench.ledger.step < steps or bench.ledger.phase == "placing":
        bench.next()
    return bench


def pass_on(bench: Bench, until: Callable[[], bool], *, most_s: float = 20.0) -> None:
    """Deliver what is under way, and let time pass where nothing is."""
    end_s = bench.now_s + most_s
    while not until():
        assert bench.now_s < end_s, f"{bench.ledger.phase}: {bench.ledger.reason}"
        bench.next() if bench.inbox else bench.tick(1.0)


def is_released(bench: Bench, name: str) -> Callable[[], bool]:
    """Whether the ledger has let a peer go since now."""
    first = len(bench.sent)

    def said() -> bool:
        return any(
            sent.peer == name and isinstance(sent.message, Release) for sent in bench.sent[first:]
        )

    return said


def idle_voter(bench: Bench) -> str:
    plan = bench.ledger.plan
    assert plan is not None
    (voter,) = set(plan.voters) - set(plan.workers())
    return voter


def has_ended_well(bench: Bench) -> None:
    bench.run()
    assert bench.commits() == list(range(STEPS)), "no step was lost or done twice"
    assert histories(bench) == {tuple(range(STEPS))}
    assert bench.ledger.progress.recoveries == 0


@pytest.mark.parametrize("first", [Answer, Placed], ids=["asked", "placing"])
def test_who_says_it_while_a_generation_is_formed_is_let_go(first: type) -> None:
    bench = trained("abcd", 2)
    bench.kill("d")
    while not any(isinstance(e, on.Heard) and isinstance(e.message, first) for e in bench.inbox):
        bench.next()
    gone = is_released(bench, "c")
    bench.feed(leaving(bench, "c"))
    pass_on(bench, gone)
    pass_on(bench, lambda: bench.ledger.phase == "training")
    assert PeerId("c") not in {*bench.ledger.plan.workers(), *bench.ledger.plan.voters}
    bench.run()
    assert bench.commits() == list(range(STEPS))
    assert histories(bench) == {tuple(range(STEPS))}


def test_who_says_it_while_its_own_state_is_waited_for_is_let_go() -> None:
    """It was chosen already, for a placement that was found before."""
    bench = trained("abc", 1)
    bench.revive("e")
    bench.tick(10.0)
    while bench.ledger.phase != "placing":
        bench.next()
    gone = is_released(bench, "e")
    bench.feed(leaving(bench, "e"))
    pass_on(bench, gone)
    assert PeerId("e") not in bench.ledger.plan.workers()
    has_ended_well(bench)


def test_who_says_it_with_the_number_of_an_older_generation_is_let_go() -> None:
    bench = trained("abcd", 2)
    bench.kill("d")
    pass_on(bench, lambda: bench.ledger.phase == "training")
    gone = is_released(bench, "c")
    bench.feed(leaving(bench, "c", generation=1))
    pass_on(bench, gone)
    bench.run()
    assert histories(bench) == {tuple(range(STEPS))}


def test_a_voter_without_slots_goes_at_once_where_a_majority_stays_and_votes_no_more() -> None:
    bench = trained("abc", 2, stages=1)
    voter = idle_voter(bench)
    before = bench.ledger.generation
    effects = bench.ledger.handle(leaving(bench, voter, generation=0), bench.now_s)
    assert on.Hangup(PeerId(voter)) in effects
    pass_on(bench, lambda: bench.ledger.generation > before)
    pass_on(bench, lambda: bench.ledger.phase == "training")
    assert bench.ledger.generation == before + 1
    assert PeerId(voter) not in bench.ledger.plan.voters
    has_ended_well(bench)
    assert bench.ledger.generation == before + 1, "it was begun again once"


def test_a_voter_without_slots_stays_while_there_is_no_majority_without_it() -> None:
    bench = trained("abc", 2, stages=1)
    voter = idle_voter(bench)
    (other,) = set(bench.ledger.plan.voters) - {"a", voter}
    gone = is_released(bench, voter)
    bench.kill(other)
    said = bench.ledger.handle(leaving(bench, voter), bench.now_s)
    assert not said, "it has to agree to the next generation first"
    pass_on(bench, gone)
    pass_on(bench, lambda: bench.ledger.phase == "training")
    assert bench.ledger.plan.voters == ("a",)


def test_a_voter_in_whose_place_another_machine_can_vote_is_replaced() -> None:
    bench = trained("abcd", 2, stages=1)
    voter = idle_voter(bench)
    bench.feed(leaving(bench, voter))
    has_ended_well(bench)
    assert len(bench.ledger.plan.voters) == 3
    assert PeerId(voter) not in bench.ledger.plan.voters


def test_who_is_being_seen_off_when_the_last_step_is_done_goes_all_the_same() -> None:
    bench = trained("abcd", STEPS - 1)
    plan = bench.ledger.plan
    assert plan is not None
    worker = next(peer for peer in plan.workers() if peer != "a")
    gone = is_released(bench, worker)
    bench.feed(leaving(bench, worker))
    bench.run()
    pass_on(bench, lambda: gone() or bool(bench.feed(leaving(bench, worker))))
    assert worker not in bench.ledger.plan.workers()


@pytest.mark.parametrize("phase", ["evaluating", "saving"])
def test_who_says_it_when_all_steps_are_done_goes_once_the_state_is_kept(phase: str) -> None:
    bench = trained("abcd", 2)
    while bench.ledger.phase != phase:
        bench.next()
    worker = next(peer for peer in bench.ledger.plan.workers() if peer != "a")
    gone = is_released(bench, worker)
    bench.feed(leaving(bench, worker))
    assert not gone(), "what it holds is not kept yet"
    pass_on(bench, gone)
    assert bench.ledger.checkpoint is not None
    assert bench.ledger.checkpoint.step == STEPS
    has_ended_well(bench)
    assert worker not in bench.ledger.plan.workers()


def test_who_says_it_while_the_job_serves_goes_once_others_have_its_slots() -> None:
    bench = trained("abcd", 2)
    bench.run()
    worker = next(peer for peer in bench.ledger.plan.workers() if peer != "a")
    gone = is_released(bench, worker)
    bench.feed(leaving(bench, worker))
    assert not gone()
    pass_on(bench, gone)
    has_ended_well(bench)
    assert worker not in bench.ledger.plan.workers()


def test_to_say_it_again_changes_nothing() -> None:
    once, often = (trained("abcd", 2) for _ in range(2))
    for bench in (once, often):
        bench.feed(leaving(bench, "c"))
    sent = len(often.sent)
    for _ in range(5):
        assert often.ledger.handle(leaving(often, "c"), often.now_s) == []
    assert len(often.sent) == sent
    for bench in (once, often):
        has_ended_well(bench)
    assert once.journal == often.journal


def test_two_that_leave_one_after_the_other_are_both_let_go() -> None:
    bench = trained("abcde", 2)
    first, second = [peer for peer in bench.ledger.plan.workers() if peer != "a"][:2]
    gone = [is_released(bench, peer) for peer in (first, second)]
    bench.feed(leaving(bench, first))
    bench.next()
    bench.feed(leaving(bench, second))
    pass_on(bench, lambda: all(each() for each in gone))
    has_ended_well(bench)


def test_a_newcomer_that_leaves_before_it_has_a_slot_does_not_keep_others_from_leaving() -> None:
    bench = trained("abc", 1)
    bench.revive("e")
    bench.feed(leaving(bench, "c"))
    assert bench.ledger.newcomers == {PeerId("e")}
    effects = bench.ledger.handle(leaving(bench, "e"), bench.now_s)
    assert on.Hangup(PeerId("e")) in effects
    assert PeerId("e") not in bench.ledger.newcomers
    pass_on(bench, is_released(bench, "c"))
    assert PeerId("e") not in bench.ledger.plan.workers()
    has_ended_well(bench)


def test_who_comes_back_gets_work_again_whatever_its_earlier_life_said() -> None:
    bench = trained("abc", 1)
    bench.adverts[PeerId("c")] = replace(bench.adverts[PeerId("c")], incarnation=2)
    bench.start()
    before = bench.ledger.generation
    bench.feed(leaving(bench, "c", life=1))
    has_ended_well(bench)
    assert bench.ledger.generation == before


def test_whoever_leaves_a_job_that_waits_is_let_go_at_once() -> None:
    bench = trained("abc", 2, peers=3)
    bench.kill("c")
    del bench.adverts[PeerId("c")]
    bench.start()
    pass_on(bench, lambda: bench.ledger.phase == "waiting")
    effects = bench.ledger.handle(leaving(bench, "b"), bench.now_s)
    assert effects == [on.Hangup(PeerId("b"))]
