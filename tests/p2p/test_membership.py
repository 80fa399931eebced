"""Membership: leases, lives, and bad records counted."""

import random
from dataclasses import replace

import pytest
from advert_makers import advert, identity, record

from swarmnode.p2p import adverts
from swarmnode.p2p.adverts import MAX_LEASE_S
from swarmnode.p2p.membership import (
    PIECE,
    Changed,
    Heard,
    Joined,
    Lost,
    Membership,
    Records,
    Tick,
)

NOW_S = 1_700_000_000.0
A, B, C = identity(1), identity(2), identity(3)


def of(**ends: bytes) -> Records:
    names = {"a": A.peer, "b": B.peer, "c": C.peer}
    return Records({names[name]: raw for name, raw in ends.items()})


def test_peers_join_once_and_are_sorted() -> None:
    members = Membership(lease_s=30)
    event = of(b=record(B, NOW_S + 30), a=record(A, NOW_S + 30), c=record(C, NOW_S + 30))
    effects = members.handle(event, NOW_S)
    order = sorted([A.peer, B.peer, C.peer])
    assert [effect.advert.peer for effect in effects if isinstance(effect, Joined)] == order
    assert [peer.peer for peer in members.peers(NOW_S)] == order
    assert members.handle(event, NOW_S + 1) == []


def test_a_peer_is_lost_when_its_lease_ends() -> None:
    members = Membership(lease_s=30)
    members.handle(of(a=record(A, NOW_S + 30)), NOW_S)
    assert members.handle(Tick(), NOW_S + 29.9) == []
    assert members.peers(NOW_S + 30) == ()
    assert members.handle(Tick(), NOW_S + 30) == [Lost(A.peer)]
    assert members.handle(Tick(), NOW_S + 31) == []


def test_a_renewed_lease_is_no_news() -> None:
    members = Membership(lease_s=30)
    members.handle(of(a=record(A, NOW_S + 30)), NOW_S)
    assert members.handle(of(a=record(A, NOW_S + 40)), NOW_S + 10) == []
    assert members.handle(Tick(), NOW_S + 39) == []
    assert members.handle(Tick(), NOW_S + 40) == [Lost(A.peer)]


def test_a_peer_that_is_heard_stays_without_a_directory() -> None:
    members = Membership(lease_s=30)
    members.handle(of(a=record(A, NOW_S + 30)), NOW_S)
    members.handle(Heard(A.peer), NOW_S + 25)
    assert members.handle(Tick(), NOW_S + 54) == []
    assert [peer.peer for peer in members.peers(NOW_S + 54)] == [A.peer]
    assert members.handle(Heard(A.peer), NOW_S + 55) == [Lost(A.peer)]
    assert members.handle(Heard(A.peer), NOW_S + 56) == []
    assert members.peers(NOW_S + 56) == ()


def test_a_new_life_replaces_an_old_one_and_never_back() -> None:
    members = Membership(lease_s=30)
    first, second = record(A, NOW_S + 30), record(A, NOW_S + 31, incarnation=2)
    members.handle(of(a=first), NOW_S)
    effects = members.handle(of(a=second), NOW_S)
    assert effects == [Changed(advert(A, NOW_S + 31, incarnation=2))]
    assert members.handle(of(a=record(A, NOW_S + 60)), NOW_S) == []
    assert members.peers(NOW_S)[0].incarnation == 2
    assert members.dropped == {"stale": 1}


def test_an_old_life_does_not_come_back_after_the_loss_either() -> None:
    members = Membership(lease_s=30)
    members.handle(of(a=record(A, NOW_S + 30, incarnation=2)), NOW_S)
    late = of(a=record(A, NOW_S + 500, incarnation=1))
    assert members.handle(late, NOW_S + 30) == [Lost(A.peer)]
    assert members.peers(NOW_S + 30) == ()
    assert members.dropped == {"stale": 1}
    again = record(A, NOW_S + 70, incarnation=2)
    assert [type(e) for e in members.handle(of(a=again), NOW_S + 40)] == [Joined]


def test_the_memory_of_lost_peers_ends() -> None:
    members = Membership(lease_s=30)
    members.handle(of(a=record(A, NOW_S + 30, incarnation=2)), NOW_S)
    members.handle(Tick(), NOW_S + 30)
    later_s = NOW_S + 41 + MAX_LEASE_S
    reborn = of(a=record(A, later_s + 30, incarnation=1))
    assert [type(e) for e in members.handle(reborn, later_s)] == [Joined]


def test_the_memory_of_lost_peers_is_bounded() -> None:
    """Strangers with short leases come and go; who was lost last is remembered."""
    members = Membership(lease_s=30, max_peers=3)
    for number in range(1, 8):
        now_s = NOW_S + 10 * number
        who = identity(number)
        members.handle(Records({who.peer: record(who, now_s + 5, incarnation=2)}), now_s)
    members.handle(Tick(), NOW_S + 80)
    first, last = (
        Records({who.peer: record(who, NOW_S + 110, incarnation=1)})
        for who in (identity(1), identity(7))
    )
    assert [type(effect) for effect in members.handle(first, NOW_S + 80)] == [Joined]
    assert members.handle(last, NOW_S + 80) == []
    assert members.dropped == {"stale": 1}


def test_another_device_is_a_change() -> None:
    members = Membership(lease_s=30)
    before = advert(A, NOW_S + 30)
    members.handle(of(a=record(A, NOW_S + 30)), NOW_S)
    device = replace(before.device, memory_free_bytes=1)
    effects = members.handle(of(a=record(A, NOW_S + 31, device=device)), NOW_S)
    assert effects == [Changed(replace(before, device=device, expires_at_s=NOW_S + 31))]


def test_bad_records_are_dropped_and_counted_by_reason() -> None:
    members = Membership(lease_s=30)
    good = record(A, NOW_S + 30)
    effects = members.handle(
        Records(
            {
                A.peer: good,
                B.peer: good,  # somebody else's advert
                C.peer: record(C, NOW_S + 30)[:-1] + b"!",  # a broken signature
                "x": b"",
                "y": bytes(5000),
                identity(4).peer: record(identity(4), NOW_S - 1),
                identity(5).peer: record(identity(5), NOW_S + 9999),
            }
        ),
        NOW_S,
    )
    assert effects == [Joined(advert(A, NOW_S + 30))]
    assert members.dropped == {
        "foreign": 1,
        "signature": 1,
        "schema": 1,
        "size": 1,
        "expired": 1,
        "lease": 1,
    }


def test_a_flood_of_peers_is_bounded() -> None:
    members = Membership(lease_s=30, max_peers=3)
    flood = Records({identity(n).peer: record(identity(n), NOW_S + 30) for n in range(1, 8)})
    assert len(members.handle(flood, NOW_S)) == 3
    assert len(members.peers(NOW_S)) == 3
    assert members.dropped == {"full": 4}


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whose signatures were verified, in turn."""
    seen: list[str] = []
    verify = adverts.verify_signature

    def counted(peer: str, message: bytes, signature: bytes) -> bool:
        seen.append(peer)
        return verify(peer, message, signature)

    monkeypatch.setattr(adverts, "verify_signature", counted)
    return seen


def test_a_record_is_verified_once_however_often_it_comes(verified: list[str]) -> None:
    members = Membership(lease_s=30, max_peers=2)
    event = of(a=record(A, NOW_S + 30), b=record(B, NOW_S + 30))
    for second in range(5):
        members.handle(event, NOW_S + second)
    assert sorted(verified) == sorted([A.peer, B.peer])
    members.handle(of(a=record(A, NOW_S + 40)), NOW_S + 5)
    assert verified[2:] == [A.peer]
    forged = record(A, NOW_S + 50)[:-1] + b"!"
    for _ in range(2):  # what was refused is not remembered as good
        members.handle(of(a=forged), NOW_S + 6)
    assert members.dropped == {"signature": 2}
    assert members.handle(event, NOW_S + 40) == [Lost(peer) for peer in sorted([A.peer, B.peer])]
    assert members.dropped == {"signature": 2, "expired": 2}


def test_strangers_displace_nobody_and_cost_no_signature(verified: list[str]) -> None:
    members = Membership(lease_s=30, max_peers=3)
    strangers = {identity(n).peer: record(identity(n), NOW_S + 60) for n in range(11, 31)}
    members.handle(of(a=record(A, NOW_S + 30)), NOW_S)
    members.handle(Records(strangers), NOW_S)
    assert len(members.peers(NOW_S)) == 3
    verified.clear()
    told = {A.peer: record(A, NOW_S + 50), B.peer: record(B, NOW_S + 50), **strangers}
    members.handle(Records(told, {B.peer}), NOW_S + 10)
    here = {advert.peer for advert in members.peers(NOW_S + 40)}
    assert {A.peer, B.peer} < here, "who was here, and who is in a job of ours"
    assert len(here) == 4
    assert sorted(verified) == sorted([A.peer, B.peer])
    assert members.dropped == {"full": 18 + 18}


def test_many_records_come_in_pieces_that_are_the_same_together() -> None:
    many = Records({str(n): bytes([n]) for n in range(2 * PIECE + 1)}, {"7"})
    pieces = list(many.pieces())
    assert [len(piece.records) for piece in pieces] == [PIECE, PIECE, 1]
    assert {k: v for piece in pieces for k, v in piece.records.items()} == many.records
    assert all(piece.partners == {"7"} for piece in pieces)
    assert list(Records({}).pieces()) == [Records({})], "leases end all the same"


@pytest.mark.parametrize("seed", range(10))
def test_effects_and_peers_tell_the_same_story(seed: int) -> None:
    chance = random.Random(seed)
    members = Membership(lease_s=10)
    who = [identity(n) for n in range(1, 6)]
    here: set[str] = set()
    now_s = NOW_S
    for _ in range(200):
        now_s += chance.uniform(0, 4)
        one = chance.choice(who)
        event = chance.choice(
            [
                Tick(),
                Heard(one.peer),
                Records({one.peer: record(one, now_s + 10, incarnation=chance.randint(1, 4))}),
            ]
        )
        for effect in members.handle(event, now_s):
            match effect:
                case Joined(joined):
                    assert joined.peer not in here
                    here.add(joined.peer)
                case Lost(peer):
                    here.remove(peer)
                case Changed(changed):
                    assert changed.peer in here
        assert [peer.peer for peer in members.peers(now_s)] == sorted(here)
