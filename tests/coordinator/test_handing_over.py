"""A coordinator that leaves gives its slots to others, and then its place to a standby."""

import pytest

from swarmnode.coordinator import events as on
from swarmnode.domain import PeerId
from swarmnode.handovers import HandOver, Leaving, StandingBy
from swarmnode.messages import Begin
from tests.coordinator.bench import Bench, histories, manifest

STEPS = 12
ME = PeerId("a")


def trained(names: str, steps: int, **section: int) -> Bench:
    """A job that `a` coordinates and works for, and that has done so many steps."""
    section = {"checkpoint_every": 100, **section}
    bench = Bench(manifest(steps=STEPS, **section), names).start()
    while bench.ledger.step < steps or bench.ledger.phase == "placing":
        bench.next()
    assert bench.ledger.plan is not None
    assert ME in bench.ledger.plan.workers()
    return bench


def stand_by(bench: Bench, *names: str) -> None:
    for name in names:
        word = StandingBy(bench.ledger.job, bench.ledger.generation)
        bench.feed(on.Heard(PeerId(name), word))


def leave(bench: Bench, *names: str) -> None:
    """Said again each second, as a daemon does."""
    for name in names:
        bench.feed(on.Heard(PeerId(name), Leaving(bench.ledger.job, bench.ledger.generation, 1)))


def pass_on(bench: Bench, phase: str, *, most_s: float = 20.0) -> None:
    end_s = bench.now_s + most_s
    while bench.ledger.phase != phase:
        assert bench.now_s < end_s, f"{bench.ledger.phase}: {bench.ledger.reason}"
        if bench.inbox:
            bench.next()
        else:
            bench.tick(1.0)
            leave(bench, "a")


def last_words(bench: Bench) -> dict[PeerId, PeerId]:
    """Whom each peer was told to expect."""
    said = [(sent.peer, sent.message) for sent in bench.sent]
    return {peer: word.heir for peer, word in said if isinstance(word, HandOver)}


def test_a_standby_goes_on_once_others_have_the_slots() -> None:
    bench = trained("abcd", 2)
    stand_by(bench, "b", "c", "d")
    leave(bench, "a")
    pass_on(bench, "handed over")
    plan = bench.ledger.plan
    assert plan is not None
    assert ME not in plan.workers()
    assert plan.voters[0] == ME
    told = last_words(bench)
    assert set(told) == {*plan.workers(), *plan.voters}
    assert set(told.values()) == {plan.voters[1]}
    assert not any(isinstance(e, on.Heard) and e.peer in plan.workers() for e in bench.inbox), (
        "no step was on its way"
    )
    begun = [sent.message.step for sent in bench.sent if isinstance(sent.message, Begin)]
    assert set(begun) == set(bench.commits())
    assert histories(bench) <= {tuple(range(bench.ledger.step)), ()}


def test_it_goes_on_itself_until_a_standby_has_all_that_it_needs() -> None:
    bench = trained("abcd", 2)
    leave(bench, "a")
    pass_on(bench, "training")
    while bench.ledger.step < 6:
        bench.next() if bench.inbox else bench.tick(1.0)
    assert not last_words(bench)
    plan = bench.ledger.plan
    assert plan is not None
    assert ME not in plan.workers()
    last = bench.ledger.generation
    stand_by(bench, plan.voters[2])
    pass_on(bench, "handed over")
    assert bench.ledger.generation == last, "it did not begin anew for itself again and again"
    assert set(last_words(bench).values()) == {plan.voters[2]}


def test_who_leaves_too_or_is_gone_is_not_named() -> None:
    bench = trained("abcde", 2, stages=1, slots=2)
    stand_by(bench, "b", "c", "d", "e")
    leave(bench, "b")
    bench.kill("c")
    leave(bench, "a")
    pass_on(bench, "handed over")
    assert set(last_words(bench).values()) <= {PeerId("d"), PeerId("e")}


def test_where_it_serves_no_step_is_waited_for() -> None:
    bench = trained("abc", 2)
    bench.run()
    stand_by(bench, "b", "c")
    leave(bench, "a")
    pass_on(bench, "handed over")
    assert bench.commits() == list(range(STEPS))


def test_alone_it_hangs_up_on_itself_and_the_job_rests() -> None:
    bench = trained("a", 2, stages=1, slots=1)
    effects = bench.ledger.handle(
        on.Heard(ME, Leaving(bench.ledger.job, bench.ledger.generation, 1)), bench.now_s
    )
    assert on.Hangup(ME) in effects
    assert bench.ledger.phase == "waiting"
    assert not last_words(bench)


@pytest.mark.parametrize("names", ["abc", "abcd"])
def test_where_all_leave_nobody_waits(names: str) -> None:
    bench = trained(names, 2)
    stand_by(bench, *names)
    leave(bench, *names)
    pass_on(bench, "waiting")
    assert not last_words(bench)


def test_a_standby_that_lacks_the_newest_checkpoint_or_was_lost_is_not_ready() -> None:
    bench = trained("abcd", 2, checkpoint_every=4)
    stand_by(bench, "b", "c", "d")
    bench.feed(on.WorkerLost(PeerId("d"), "closed its stream"))
    assert bench.ledger.standing_by == {PeerId("b"), PeerId("c")}
    while bench.ledger.checkpoint is None:
        bench.next() if bench.inbox else bench.tick(1.0)
    assert not bench.ledger.standing_by


def test_where_others_cannot_agree_it_does_not_wait() -> None:
    bench = trained("abc", 2)
    bench.kill("b")
    bench.kill("c")
    while bench.inbox:
        bench.next()
    leaving = on.Heard(ME, Leaving(bench.ledger.job, bench.ledger.generation, 1))
    for waited_s in range(5):
        assert bench.ledger.handle(leaving, bench.now_s + waited_s) == []
    assert bench.ledger.handle(leaving, bench.now_s + 5.0) == [on.Hangup(ME)]


@pytest.mark.parametrize("sees_those_who_talk_to_it", [True, False])
def test_who_waits_for_peers_and_does_not_see_who_talks_to_it_lets_another_try(
    sees_those_who_talk_to_it: bool,
) -> None:
    """Its wall clock jumped: to it all adverts but its own are long over."""
    bench = trained("abcd", 2, peers=4)
    seen = "abd" if sees_those_who_talk_to_it else "a"
    bench.adverts = {peer: a for peer, a in bench.adverts.items() if peer in seen}
    bench.start()
    bench.kill("c")
    while bench.inbox or bench.ledger.phase != "waiting":
        bench.next() if bench.inbox else bench.tick(1.0)
    for _ in range(29):
        bench.tick(1.0)
        bench.start()
    assert bench.ledger.phase == "waiting"
    for _ in range(3):
        bench.tick(1.0)
    assert bool(last_words(bench)) != sees_those_who_talk_to_it
    assert set(last_words(bench).values()) <= {PeerId("b"), PeerId("d")}
