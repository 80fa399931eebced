"""Leases: what an elected coordinator shows, and everything that a forger may try."""

import contextlib
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmnode.coordinator.recovery import MAX_ASSIGNED_UPDATES
from swarmnode.domain import BlobRef, Generation, JobId, PeerId, Plan
from swarmnode.errors import ProtocolError
from swarmnode.fields import MAX_LEASE_BYTES
from swarmnode.messages import Adopt, Assign, Committed
from swarmnode.p2p.identity import Identity
from swarmnode.p2p.lease import MAX_ELECTIONS, Lease, vote_text
from swarmnode.wire import pack, unpack

JOB = JobId("0123456789abcdef")
PEOPLE = [Identity(bytes([number]) * 32) for number in range(5)]
PEERS = [identity.peer for identity in PEOPLE]


def elected(voters: int = 4, votes: int = 3, *, holder: int = 1) -> Lease:
    """The submitter (0) appointed `voters`; of them the last `votes` elected `holder`."""
    appointed = Lease().appoint(JOB, Generation(3), tuple(PEERS[:voters]), PEOPLE[0].sign)
    text = vote_text(JOB, 5, PEERS[holder])
    said = {p.peer: p.sign(text) for p in PEOPLE[voters - votes : voters]}
    return appointed.won(PEERS[0], Generation(5), PEERS[holder], said)


def test_without_an_election_the_submitter_coordinates() -> None:
    assert Lease().holder(JOB, PEERS[0]) == (PEERS[0], 0)


def test_an_elected_peer_coordinates_and_may_be_succeeded() -> None:
    lease = elected()
    assert Lease.decode(lease.encode()) == lease
    assert lease.holder(JOB, PEERS[0]) == (PEERS[1], 5)
    lease = lease.appoint(JOB, Generation(6), tuple(PEERS[1:4]), PEOPLE[1].sign)
    text = vote_text(JOB, 9, PEERS[2])
    lease = lease.won(
        PEERS[0], Generation(9), PEERS[2], {p.peer: p.sign(text) for p in PEOPLE[2:4]}
    )
    assert lease.holder(JOB, PEERS[0]) == (PEERS[2], 9)


@pytest.mark.parametrize(("voters", "votes"), [(4, 2), (2, 1), (1, 0)])
def test_half_of_the_voters_are_not_a_majority(voters: int, votes: int) -> None:
    with pytest.raises(ProtocolError, match="election"):
        elected(voters, votes).holder(JOB, PEERS[0])


def test_what_was_signed_for_something_else_does_not_count() -> None:
    lease = elected()
    election = lease.elections[0]
    other = PEERS[4]
    forged = {
        "another holder": replace(election, holder=other),
        "another generation": replace(election, generation=Generation(6)),
        "an older generation": replace(election, generation=Generation(3)),
        "other voters": replace(
            election, appointment=replace(election.appointment, voters=(other, PEERS[3]))
        ),
    }
    for wrong in forged.values():
        with pytest.raises(ProtocolError):
            Lease((wrong,)).holder(JOB, PEERS[0])
    with pytest.raises(ProtocolError):
        lease.holder(JobId("f" * 16), PEERS[0])
    with pytest.raises(ProtocolError):
        lease.holder(JOB, other)


def test_only_the_holder_appoints_voters() -> None:
    lease = elected().appoint(JOB, Generation(6), tuple(PEERS[:2]), PEOPLE[0].sign)
    with pytest.raises(ProtocolError, match="appoint"):
        lease.holder(JOB, PEERS[0])


@given(st.binary(max_size=400))
def test_bytes_of_strangers_are_a_lease_or_refused(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert Lease.decode(data).holder(JOB, PEERS[0])[0] == PEERS[0]


@given(st.data())
def test_a_flipped_byte_never_makes_another_holder(data: st.DataObject) -> None:
    encoded = bytearray(elected().encode())
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= data.draw(st.integers(1, 255))
    try:
        holder, _ = Lease.decode(bytes(encoded)).holder(JOB, PEERS[0])
    except ProtocolError:
        return
    assert holder == PEERS[1]


# ---- many elections ----------------------------------------------------------------------------

CROWD = [Identity(number.to_bytes(32, "big")) for number in range(1, MAX_ELECTIONS + 9)]


def grown(lease: Lease, generation: int, voters: list[Identity], winner: int) -> Lease:
    """The first of `voters` has appointed all of them, and all but it elected one."""
    first, *others = voters
    holder = voters[winner].peer
    text = vote_text(JOB, generation + 1, holder)
    appointed = lease.appoint(
        JOB, Generation(generation), tuple(voter.peer for voter in voters), first.sign
    )
    votes = {voter.peer: voter.sign(text) for voter in others}
    return appointed.won(CROWD[0].peer, Generation(generation + 1), holder, votes)


@pytest.fixture(scope="module")
def longest() -> Lease:
    """Of as many elections as there may be, each by six of seven voters and of somebody new."""
    lease = Lease()
    for number in range(MAX_ELECTIONS):
        lease = grown(lease, 10**6 + 10 * number, CROWD[number : number + 7], winner=1)
    voters = tuple(person.peer for person in CROWD[-8:])
    return lease.appoint(JOB, Generation(10**7), voters, CROWD[MAX_ELECTIONS].sign)


def test_a_thousand_machines_in_turn_can_coordinate(longest: Lease) -> None:
    data = longest.encode()
    assert len(longest.elections) == MAX_ELECTIONS == 1000
    assert len(data) <= MAX_LEASE_BYTES
    lease = Lease.decode(data)
    assert lease == longest
    assert lease.holder(JOB, CROWD[0].peer) == (CROWD[MAX_ELECTIONS].peer, 10**6 + 9991)


def test_the_longest_lease_goes_with_the_largest_assignment() -> None:
    stages, update = 8, BlobRef("a" * 64, 16 << 20)
    crowd = [PeerId(f"{number:052d}") for number in range(256)]
    plan = Plan(
        Generation(1 << 40),
        tuple((n, n + 1) for n in range(stages)),
        tuple(tuple(crowd[32 * n : 32 * n + 32]) for n in range(stages)),
        crowd[0],
        dict.fromkeys(crowd, ("/ip4/100.100.100.100/tcp/10000",) * 2),
        voters=tuple(crowd[:7]),
        voters_before=tuple(crowd[:7]),
    )
    step = MAX_ASSIGNED_UPDATES // stages
    commits = tuple(Committed(n, 1 / 3, (update,) * stages) for n in range(step))
    lease = bytes(MAX_LEASE_BYTES)
    for message in (
        Assign(JOB, plan, step, (), bytes(64), commits, lease),
        Adopt(JOB, plan, lease),
    ):
        assert unpack(pack(message))[0] == message


def test_who_comes_back_needs_nothing_of_what_happened_meanwhile() -> None:
    a, b, c, d = people = CROWD[:4]
    once = grown(Lease(), 1, [a, b, c, d], winner=1)
    lease = grown(once, 3, [b, c, d, a], winner=1)
    lease = grown(lease, 5, [c, d, a, b], winner=3)
    assert [e.holder for e in lease.elections] == [b.peer, c.peer, b.peer], "newly elected"
    assert lease.holder(JOB, a.peer) == (b.peer, 6)
    lease = grown(lease, 7, [b, c, d, a], winner=2)
    assert [e.holder for e in lease.elections] == [b.peer, d.peer]
    assert lease.elections[0] == once.elections[0]
    assert lease.holder(JOB, a.peer) == (d.peer, 8)
    lease = grown(grown(lease, 9, [d, a, b, c], winner=1), 11, people, winner=2)
    assert [e.holder for e in lease.elections] == [c.peer], "the submitter had it back"
    assert lease.holder(JOB, a.peer) == (c.peer, 12)


def test_a_bare_majority_of_votes_is_kept() -> None:
    (election,) = grown(Lease(), 1, CROWD[:7], winner=1).elections
    assert len(election.votes) == 4
    assert election.is_valid(JOB)
    for peer in election.votes:
        fewer = {other: vote for other, vote in election.votes.items() if other != peer}
        assert not replace(election, votes=fewer).is_valid(JOB)
        forged = {**fewer, peer: "0" * 128}
        assert not replace(election, votes=forged).is_valid(JOB)


@pytest.mark.parametrize(
    "forge",
    [
        lambda lines: lines[:1] + lines[2:],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [lines[0].replace(b":1000001", b":1000002"), *lines[1:]],
        lambda lines: [*lines[:-1], lines[-1].replace(b"10000000", b"10000001")],
        lambda lines: [*lines[:-1], lines[-1] + b" " * (1 << 13)],
        lambda lines: lines[:-1],
        lambda lines: [*lines[:-1], b"null", b"null"],
        lambda lines: [*lines[:-1], *lines[-2:-1] * MAX_ELECTIONS, lines[-1]],
        lambda _: [b"null"] * (3 << 17),
        lambda _: [b""],
    ],
)
def test_a_forged_long_lease_is_refused(
    longest: Lease, forge: Callable[[list[bytes]], list[bytes]]
) -> None:
    short = replace(longest, elections=longest.elections[:60])
    lines = zlib.decompress(short.encode()).split(b"\n")
    changed = forge(lines)
    assert changed != lines
    with pytest.raises(ProtocolError):
        Lease.decode(zlib.compress(b"\n".join(changed))).holder(JOB, CROWD[0].peer)


@given(st.data())
def test_a_long_lease_is_read_whole_or_refused(longest: Lease, data: st.DataObject) -> None:
    encoded = replace(longest, elections=longest.elections[:50]).encode()
    at = data.draw(st.integers(0, len(encoded) - 1))
    for wrong in (encoded[:at], encoded + encoded[: at + 1]):
        if wrong:
            with pytest.raises(ProtocolError):
                Lease.decode(wrong)


def test_a_lease_takes_no_more_memory_than_is_said(longest: Lease) -> None:
    packer = zlib.compressobj()
    bomb = b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(256)), packer.flush()])
    assert len(bomb) <= MAX_LEASE_BYTES
    voters = tuple("abcdefghijklmnop")
    election = longest.elections[0]
    crowded = replace(
        election,
        appointment=replace(election.appointment, voters=voters),
        votes=dict.fromkeys(voters, "0" * 128),
    )
    for lease in (bomb, longest.encode(), Lease((crowded,) * 550).encode()):
        tracemalloc.start()
        with contextlib.suppress(ProtocolError):
            kept = Lease.decode(lease)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 << 20
    assert kept.elections == (crowded,) * 550
    with pytest.raises(ProtocolError):
        Lease.decode(bomb)
    with pytest.raises(ProtocolError):
        Lease.decode(b"{" + b" " * (1 << 16))


def test_what_older_versions_wrote_is_read() -> None:
    everybody = grown(Lease(), 1, CROWD[:7], winner=1)
    text = vote_text(JOB, 2, CROWD[1].peer)
    votes = {person.peer: person.sign(text).hex() for person in CROWD[1:7]}
    old = Lease((replace(everybody.elections[0], votes=votes),))
    assert old.encode().startswith(b"{")
    assert Lease.decode(old.encode()) == old
    assert old.holder(JOB, CROWD[0].peer) == (CROWD[1].peer, 2)
