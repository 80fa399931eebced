"""Who sent a bad chunk is asked last: for a while, and while there is somebody else."""

from collections import Counter
from pathlib import Path

from blob_swarm import JOB, ME, OK, Swarm, refs_of

from swarmnode.domain import PeerId
from swarmnode.p2p.blobs import BlobClient
from swarmnode.p2p.memory import MemoryNetwork
from swarmnode.p2p.suspects import MAX_SUSPECTS, SUSPECT_S, Suspects

LIAR = PeerId("liar")


async def test_a_liar_is_asked_once_and_then_only_when_nobody_else_can_help(
    tmp_path: Path,
) -> None:
    now_s = 1000.0
    async with MemoryNetwork() as network:
        swarm = Swarm(network, tmp_path)
        data = [bytes([number]) * 1000 for number in range(5)]
        refs = refs_of(data, tmp_path)
        good = swarm.seeder("good", data[:3] + data[4:])
        liar = swarm.liar(LIAR, OK, b"\x99" * 1000)
        fetched = swarm.fetched.of
        client = BlobClient(network.transport(ME), swarm.store, swarm.fetched, now_s=lambda: now_s)

        async def fetch(number: int) -> int:
            """How often the liar was asked and caught until the blob is there."""
            before = fetched["bad_chunk", LIAR]
            assert await client.fetch(JOB, refs[number], [liar, good]) == data[number]
            return fetched["bad_chunk", LIAR] - before

        assert await fetch(0) == 1, "named first, it is asked first"
        assert await fetch(1) == 0
        now_s += SUSPECT_S - 1.0
        assert await fetch(2) == 0
        honest = swarm.seeder(LIAR, data)  # it has thought better of it
        assert await client.fetch(JOB, refs[3], [honest, good]) == data[3], "nobody else has it"
        assert fetched["received_bytes", LIAR] == len(data[3])
        now_s += 2.0
        assert await client.fetch(JOB, refs[4], [honest, good]) == data[4]
        assert fetched["received_bytes", LIAR] == len(data[3]) + len(data[4]), "time is over"


def test_suspects_are_bounded_and_the_oldest_offence_goes() -> None:
    suspects = Suspects()
    for number in range(MAX_SUSPECTS):
        suspects.charge(PeerId(str(number)), float(number))
    suspects.charge(PeerId("0"), float(MAX_SUSPECTS))
    suspects.charge(PeerId("new"), float(MAX_SUSPECTS))
    now_s = MAX_SUSPECTS + 1.0
    assert len(suspects) == MAX_SUSPECTS
    kept = Counter(suspects.has(PeerId(str(number)), now_s) for number in range(MAX_SUSPECTS))
    assert kept == {True: MAX_SUSPECTS - 1, False: 1}
    assert not suspects.has(PeerId("1"), now_s)
    assert suspects.has(PeerId("0"), MAX_SUSPECTS + SUSPECT_S - 0.1)
    assert not suspects.has(PeerId("0"), MAX_SUSPECTS + SUSPECT_S)
