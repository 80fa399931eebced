"""A node that limits what it serves: slower, whole, and nobody takes it for lost."""

import asyncio
import time
from pathlib import Path

import msgpack
import pytest
from blob_swarm import JOB, ME, OK, Swarm, contents, refs_of

from swarmnode.errors import ChunkError, PeerLostError
from swarmnode.p2p import blob_protocol, blob_server
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.blobs import BlobClient, Provider
from swarmnode.p2p.memory import MemoryNetwork

WAIT, PACED = (msgpack.packb({"status": status}) for status in ("wait", "paced"))


async def test_a_limited_seeder_takes_its_time_and_an_unlimited_one_does_not(
    tmp_path: Path,
) -> None:
    rate, measured = 2e6, []
    async with MemoryNetwork() as network:
        swarm = Swarm(network, tmp_path)
        data = contents(3, 400_000)
        refs = refs_of(data, tmp_path)

        async def taken_s(name: str, provider: Provider) -> float:
            """By two who fetch at once, each all of it."""
            stores = [BlobStore(tmp_path / f"{name}-{number}") for number in range(2)]
            clients = [
                BlobClient(
                    network.transport(ME), store, on_transfer=lambda *seen: measured.append(seen)
                )
                for store in stores
            ]
            began_s = time.monotonic()
            async with asyncio.TaskGroup() as group:
                for client in clients:
                    group.create_task(client.fetch_all(JOB, refs, [provider]))
            took_s = time.monotonic() - began_s
            assert all([store.read(ref) for ref in refs] == data for store in stores)
            return took_s

        limited_s = await taken_s("limited", swarm.seeder("a", data, upload_bytes_per_s=rate))
        assert measured == [], "a paced answer says nothing about the link"
        unlimited_s = await taken_s("unlimited", swarm.seeder("b", data))
        assert len(measured) == 2 * len(data)
    num_bytes = 2 * sum(map(len, data))
    assert limited_s >= (num_bytes - blob_protocol.PIECE_BYTES) / rate
    assert limited_s >= 2 * unlimited_s


@pytest.mark.parametrize("bytes_per_s", [0.5e6 / 8, 1e6 / 8, 1e7 / 8, 1e9 / 8])
def test_whoever_is_served_gets_far_more_than_what_counts_as_lost(bytes_per_s: float) -> None:
    upload = blob_server._Upload(bytes_per_s)
    assert bytes_per_s / upload.num_at_once > 3 * blob_protocol.MIN_BYTES_PER_S
    assert upload.piece_bytes / bytes_per_s < 1.0


async def test_who_waits_for_its_turn_does_not_take_the_seeder_for_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at a time, 0.15 s each: the fourth of four has its blob after 0.6 s, over the limit."""
    monkeypatch.setattr(blob_protocol, "MIN_TIMEOUT_S", 0.5)
    monkeypatch.setattr(blob_protocol, "MIN_BYTES_PER_S", 1e9)
    monkeypatch.setattr(blob_server, "MAX_SENDING", 1)
    monkeypatch.setattr(blob_protocol, "NOTICE_S", 0.05)
    async with MemoryNetwork() as network:
        swarm = Swarm(network, tmp_path)
        data = contents(8, 150_000)
        refs = refs_of(data, tmp_path)
        slow = swarm.seeder("slow", data, upload_bytes_per_s=1e6)
        await swarm.client.fetch_all(JOB, refs, [slow])
        assert [swarm.store.read(ref) for ref in refs] == data
        assert swarm.fetched.of["lost", "slow"] == 0


async def test_those_who_wait_come_in_the_order_in_which_they_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blob_protocol, "NOTICE_S", 0.001)
    places, order, told = blob_server._Places(2), [], asyncio.Event()

    async def say_wait() -> None:
        told.set()

    async def guest(number: int) -> None:
        async with places.taken(say_wait):
            order.append(number)
            await told.wait()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(guest(number)) for number in range(6)]
        await asyncio.sleep(0)
        assert order == [0, 1]
        tasks[2].cancel()
    assert order == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("ending", [(), (WAIT,) * 300], ids=["silence", "more of it"])
async def test_patience_with_a_peer_that_only_asks_for_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: tuple[bytes, ...]
) -> None:
    monkeypatch.setattr(blob_protocol, "MIN_TIMEOUT_S", 0.05)
    monkeypatch.setattr(blob_protocol, "MIN_BYTES_PER_S", 1e9)
    async with MemoryNetwork() as network:
        swarm = Swarm(network, tmp_path)
        data = contents(1)
        (ref,) = refs_of(data, tmp_path)
        with pytest.raises((PeerLostError, ChunkError)):
            await swarm.client.fetch(JOB, ref, [swarm.liar("liar", WAIT, WAIT, *ending)])
        waits = (WAIT,) * (blob_protocol.MAX_NOTICES - 1)
        swarm.store.remove(ref)
        patient = swarm.liar("patient", *waits, PACED, data[0])
        assert await swarm.client.fetch(JOB, ref, [patient]) == data[0]
        swarm.store.remove(ref)
        plain = swarm.liar("plain", OK, data[0])
        assert await swarm.client.fetch(JOB, ref, [plain]) == data[0]
