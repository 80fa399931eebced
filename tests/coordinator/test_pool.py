"""Who may be given work: losses bar a peer for a while, only failures make a job hopeless."""

from swarmnode.coordinator.pool import Pool
from swarmnode.domain import PeerId
from tests.coordinator.bench import advert

A = PeerId("a")


def test_a_peer_that_was_only_lost_leaves_hope_and_one_that_failed_does_not() -> None:
    pool = Pool()
    pool.see([advert("a")], 0.0)
    for now_s in (1.0, 2.0, 3.0):
        pool.bar(A, now_s)
    assert not pool.is_hopeless(2)
    pool.failed(A, 4.0)
    assert not pool.is_hopeless(2)
    pool.failed(A, 5.0)
    assert pool.is_hopeless(2)
    assert pool.usable(5.0) == ()
    pool.forgive([A])
    assert not pool.is_hopeless(2)


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
