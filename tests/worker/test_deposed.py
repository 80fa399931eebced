"""Whose coordinator lives, but has been voted down by a majority, follows the one that won."""

from pathlib import Path

import pytest
from worker_node import (
    GOOD,
    ME,
    STRANGER,
    SUBMITTER,
    Node,
    answer,
    answered,
    ask,
    inquire,
    node,
)

from swarmnode.domain import Generation, PeerId, Plan
from swarmnode.messages import Adopt, Adopted
from swarmnode.p2p.identity import Identity
from swarmnode.p2p.lease import Lease, vote_text
from swarmnode.p2p.ports import Stream
from swarmnode.wire import pack


def its_plan(coordinator: PeerId, generation: int) -> Plan:
    voters = (coordinator, ME.peer, *({SUBMITTER.peer, STRANGER.peer} - {coordinator}))
    slots = ((coordinator,),)
    return Plan(Generation(generation), ((0, 1),), slots, coordinator, voters=voters)


async def follows(n: Node, leader: Identity, generation: int) -> Stream:
    """The stream of a coordinator whose plan the node has adopted."""
    stream = await ask(n, leader, inquire(generation, generation - 1))
    assert (await answered(stream)).granted
    await stream.send(pack(Adopt(GOOD.job, its_plan(leader.peer, generation))))
    assert await answer(stream) == Adopted(GOOD.job, Generation(generation))
    return stream


def elected(generation: int, *voters: Identity) -> bytes:
    """What the submitter shows that three voters have elected again for a generation."""
    everybody = (SUBMITTER.peer, ME.peer, STRANGER.peer)
    text = vote_text(GOOD.job, generation, SUBMITTER.peer)
    votes = {voter.peer: voter.sign(text) for voter in voters}
    first = Lease().appoint(GOOD.job, Generation(1), everybody, SUBMITTER.sign)
    return first.won(SUBMITTER.peer, Generation(generation), SUBMITTER.peer, votes).encode()


@pytest.mark.parametrize(
    ("based_on", "lease", "granted"),
    [
        (3, elected(3, SUBMITTER, ME), True),
        (1, elected(3, SUBMITTER, ME), False),
        (2, elected(3, SUBMITTER, ME), False),
        (3, elected(3, SUBMITTER), False),
        (3, elected(2, SUBMITTER, ME), False),
        (3, b"", False),
    ],
)
async def test_a_live_coordinator_gives_way_only_to_who_has_a_majority(
    based_on: int, lease: bytes, granted: bool, tmp_path: Path
) -> None:
    async with node(tmp_path) as n:
        first = await follows(n, SUBMITTER, 1)
        await first.reset()
        (host,) = n.service.hosts()
        await host.alone.wait()
        await follows(n, STRANGER, 2)
        said = await answered(await ask(n, SUBMITTER, inquire(3, based_on, lease=lease)))
        assert said.granted == granted
        assert (said.promised, said.promised_to) == (
            (3, SUBMITTER.peer) if granted else (2, STRANGER.peer)
        )


async def test_the_word_of_a_voter_alone_deposes_nobody(tmp_path: Path) -> None:
    async with node(tmp_path) as n:
        await follows(n, SUBMITTER, 1)
        assert not (await answered(await ask(n, STRANGER, inquire(3, 3)))).granted
