"""Who may be given work: losses bar a peer for a while, only failures make a job hopeless."""

from dataclasses import replace

from swarmnode.coordinator.pool import COOL_DOWN_S, Pool
from swarmnode.domain import PeerId
from tests.coordinator.bench import advert

A = PeerId("a")


def test_a_peer_that_was_only_lost_leaves_hope_and_one_that_failed_does_not() -> None:
    pool = Pool()
    pool.see([advert("a")], 0.0)
    for now_s in (1.0, 2.0, 3.0):
        pool.bar(A, now_s)
    assert not pool.is_hopeless(2, {A})
    pool.failed(A, 4.0)
    assert not pool.is_hopeless(2, {A})
    pool.failed(A, 5.0)
    assert pool.is_hopeless(2, {A})
    assert pool.usable(5.0) == ()
    pool.forgive([A])
    assert not pool.is_hopeless(2, {A})


def test_who_sees_nobody_else_does_not_give_the_job_up_for_the_other_workers() -> None:
    """A coordinator's wall clock had jumped: all leases but its own had ended, and its own child
    failed twice (simulation, seed 257 of more clocks than faults.toml has)."""
    pool = Pool()
    pool.see([advert("a")], 0.0)
    for now_s in (1.0, 2.0):
        pool.failed(A, now_s)
    assert not pool.is_hopeless(2, {A, PeerId("b")})
    assert pool.is_hopeless(2, {A}), "the plan was for this one alone"


def test_a_peer_whose_child_ended_may_try_again_at_once_but_not_twice() -> None:
    pool = Pool()
    pool.see([advert("a")], 0.0)
    pool.failed(A, 1.0, child_ended=True)
    assert [usable.peer for usable in pool.usable(1.0)] == [A]
    pool.failed(A, 2.0, child_ended=True)
    assert pool.usable(2.0) == ()
    pool.forgive([A])
    pool.failed(A, 3.0)
    assert pool.usable(3.0) == (), "what it cannot do now, it cannot do a moment later"


def test_a_lost_peer_that_was_started_again_is_not_barred_but_the_second_time_in_a_row() -> None:
    pool = Pool()
    first = advert("a")
    second, third = (replace(first, incarnation=first.incarnation + n) for n in (1, 2))
    pool.see([first], 0.0)
    pool.bar(A, 1.0)
    pool.see([first], 1.0)
    assert pool.usable(1.0) == ()
    pool.see([second], 2.0)
    assert pool.usable(2.0) == (second,)
    pool.bar(A, 3.0)
    pool.see([third], 4.0)
    assert pool.usable(4.0) == (), "it was lost again before it did anything"
    late_s = 3.0 + 2 * COOL_DOWN_S
    renewed = replace(third, expires_at_s=third.expires_at_s + 1.0)
    pool.see([renewed], late_s)
    assert pool.usable(late_s) == (renewed,)
    pool.forgive([A])
    pool.bar(A, late_s)
    again = replace(third, incarnation=third.incarnation + 1)
    pool.see([again], late_s)
    assert pool.usable(late_s) == (again,)


def test_who_does_no_good_here_stays_out_whatever_else_happens_to_it() -> None:
    pool = Pool()
    pool.exclude(A)  # the directory does not know it at this moment
    pool.see([advert("a")], 0.0)
    assert pool.usable(0.0) == ()
    pool.bar(A, 1.0)
    renewed = replace(advert("a"), expires_at_s=advert("a").expires_at_s + 1e6)
    pool.see([renewed], 1e5)
    assert pool.usable(1e5) == (), "a line that broke is no reason to try it again"
    again = replace(renewed, incarnation=renewed.incarnation + 1)
    pool.see([again], 1e5)
    assert pool.usable(1e5) == (again,)
