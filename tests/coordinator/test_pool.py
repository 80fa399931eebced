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
