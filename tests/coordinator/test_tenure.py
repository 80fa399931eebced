"""What a candidate shows: the lease that it was told, and its own election once it is won."""

from dataclasses import replace
from pathlib import Path

import pytest

from swarmnode.coordinator.tenure import Tenure
from swarmnode.domain import Generation, JobId, Plan
from swarmnode.messages import Adopt, Answer, Assign, Inquire
from swarmnode.p2p.identity import Identity
from swarmnode.p2p.lease import Lease, vote_text
from swarmnode.wire import pack, unpack
from swarmnode.worker.tenancy import Tenancy, may_coordinate

JOB = JobId("0123456789abcdef")
PEOPLE = [Identity(bytes([number]) * 32) for number in range(4)]
PEERS = [identity.peer for identity in PEOPLE]
ASKED = Inquire(JOB, Generation(5), Generation(3), 0, b"")
AGREED = replace(ASKED, based_on=Generation(5))


@pytest.fixture
def candidate(tmp_path: Path) -> Tenure:
    """The second of three voters whom the submitter, the first, has appointed."""
    lease = Lease().appoint(JOB, Generation(3), tuple(PEERS[:3]), PEOPLE[0].sign)
    (tmp_path / "lease").write_bytes(lease.encode())
    return Tenure(tmp_path / "lease", JOB, PEERS[0], PEERS[1], PEOPLE[1].sign)


def vote(voter: int, generation: int = 5) -> Answer:
    signed = PEOPLE[voter].sign(vote_text(JOB, generation, PEERS[1]))
    return Answer(JOB, Generation(generation), True, Generation(5), PEERS[1], (), (), signed)


def test_who_is_elected_shows_it_before_its_first_plan_begins(candidate: Tenure) -> None:
    candidate.heard(PEERS[1], vote(1))
    candidate.heard(PEERS[2], vote(2))
    before = Lease.decode(candidate.shown(ASKED))
    assert before.holder(JOB, PEERS[0]) == (PEERS[0], 0)
    shown = Lease.decode(candidate.shown(AGREED))
    assert shown.holder(JOB, PEERS[0]) == (PEERS[1], 5)
    assert candidate.shown(ASKED) == before.encode(), "an election is not won by asking"


def test_the_first_plan_appoints_voters_and_is_shown_from_then_on(candidate: Tenure) -> None:
    candidate.heard(PEERS[1], vote(1))
    candidate.heard(PEERS[2], vote(2))
    plan = Plan(Generation(5), ((0, 1),), ((PEERS[3],),), PEERS[1], voters=tuple(PEERS[1:]))
    begun = Lease.decode(candidate.begun(plan))
    assert begun.holder(JOB, PEERS[0]) == (PEERS[1], 5)
    assert begun.appointment is not None
    assert begun.appointment.voters == plan.voters
    assert Lease.decode(candidate.shown(AGREED)) == begun


def test_seven_voters_take_over_from_each_other_for_ever(tmp_path: Path) -> None:
    """Each successor has what was shown to it; newcomers and voters that were away believe it."""
    people = [Identity(bytes([number]) * 32) for number in range(1, 8)]
    peers = tuple(person.peer for person in people)
    submitter, grid = peers[0], (((0, 1),), ((peers[3],),))
    first = Plan(Generation(1), *grid, submitter, voters=peers)
    path = tmp_path / "lease"
    lease = Tenure(path, JOB, submitter, submitter, people[0].sign).begun(first)
    away = Tenancy.fresh(JOB, submitter).on_assign(Assign(JOB, first, 0, (), b""), submitter)
    assert away is not None
    for number in range(1, 201):
        generation = Generation(2 * number)
        me = people[(3 * number) % 7]
        path.write_bytes(lease)
        tenure = Tenure(path, JOB, submitter, me.peer, me.sign)
        text = vote_text(JOB, generation, me.peer)
        for voter in people:
            signed = voter.sign(text)
            said = Answer(JOB, generation, True, generation, me.peer, (), (), signed)
            tenure.heard(voter.peer, said)
        plan = Plan(generation, *grid, me.peer, voters=(me.peer, *sorted({*peers} - {me.peer})))
        asked = Inquire(JOB, generation, generation, 0, b"")
        question = replace(asked, lease=tenure.shown(asked))
        lease = tenure.begun(plan)
        assigned = Assign(JOB, plan, 0, (), b"", (), lease)
        for message in (question, assigned, Adopt(JOB, plan, lease)):
            assert unpack(pack(message))[0] == message
        newcomer = Tenancy.fresh(JOB, submitter)
        assert newcomer.may_ask(assigned, me.peer, may_coordinate)
        assert not may_coordinate(newcomer, lease, PEERS[0], generation)
        if number % 20 == 0:
            assert newcomer.may_ask(question, me.peer, may_coordinate)
            assert away.may_ask(question, me.peer, may_coordinate)
            without = replace(assigned, lease=b"")
            assert newcomer.may_ask(without, me.peer, may_coordinate) == (me.peer == submitter)
    assert len(Lease.decode(lease).elections) <= len(peers)
