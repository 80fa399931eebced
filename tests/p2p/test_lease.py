"""Leases: what an elected coordinator shows, and everything that a forger may try."""

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmnode.domain import Generation, JobId
from swarmnode.errors import ProtocolError
from swarmnode.p2p.identity import Identity
from swarmnode.p2p.lease import Lease, vote_text

JOB = JobId("0123456789abcdef")
PEOPLE = [Identity(bytes([number]) * 32) for number in range(5)]
PEERS = [identity.peer for identity in PEOPLE]


def elected(voters: int = 4, votes: int = 3, *, holder: int = 1) -> Lease:
    """The submitter (0) appointed `voters`; of them the last `votes` elected `holder`."""
    appointed = Lease().appoint(JOB, Generation(3), tuple(PEERS[:voters]), PEOPLE[0].sign)
    text = vote_text(JOB, 5, PEERS[holder])
    said = {p.peer: p.sign(text) for p in PEOPLE[voters - votes : voters]}
    return appointed.won(Generation(5), PEERS[holder], said)


def test_without_an_election_the_submitter_coordinates() -> None:
    assert Lease().holder(JOB, PEERS[0]) == (PEERS[0], 0)


def test_an_elected_peer_coordinates_and_may_be_succeeded() -> None:
    lease = elected()
    assert Lease.decode(lease.encode()) == lease
    assert lease.holder(JOB, PEERS[0]) == (PEERS[1], 5)
    lease = lease.appoint(JOB, Generation(6), tuple(PEERS[1:4]), PEOPLE[1].sign)
    text = vote_text(JOB, 9, PEERS[2])
    lease = lease.won(Generation(9), PEERS[2], {p.peer: p.sign(text) for p in PEOPLE[2:4]})
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
