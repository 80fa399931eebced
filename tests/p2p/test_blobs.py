"""Blobs between peers: several providers, bad ones, refusals, resuming."""

import asyncio
import itertools
from pathlib import Path

import msgpack
import pytest
from blob_swarm import JOB, ME, OK, Swarm, contents, refs_of
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmnode.domain import BlobRef, JobId, PeerId
from swarmnode.errors import ChunkError, PeerLostError, RefusedError, SwarmError
from swarmnode.p2p import blob_protocol
from swarmnode.p2p.blob_server import MAX_STREAMS_PER_PEER
from swarmnode.p2p.blob_store import blob_path
from swarmnode.p2p.memory import MemoryNetwork
from swarmnode.p2p.ports import EndOfStream, Stream
from swarmnode.wire import BLOB_PROTOCOL


async def test_one_blob_arrives_whole(tmp_path: Path) -> None:
    async with MemoryNetwork() as network:
        swarm = Swarm(network, tmp_path)
        data = contents(1, 3 << 20)
        (ref,) = refs_of(data, tmp_path)
        provider = swarm.seeder("a", data)
        assert await swarm.client.fetch(JOB, ref, [provider]) == data[0]
        assert swarm.store.read(ref) == data[0]
        assert swarm.served.of["sent_bytes", ME] == len(data[0])
        assert swarm.fetched.of["received_bytes", "a"] == len(data[0])


async def test_many_blobs_come_from_all_providers_and_progress_ends_at_the_total(
    tmp_path: Path,
) -> None:
    async with MemoryNetwork() as network:
        swarm = Swarm(network, tmp_path)
        data = contents(60)
        refs = refs_of(data, tmp_path)
        providers = [swarm.seeder(name, data) for name in "abc"]
        seen: list[tuple[int, int]] = []
        await swarm.client.fetch_all(JOB, refs, providers, lambda *done: seen.append(done))
        total = sum(map(len, data))
        assert [swarm.store.read(ref) for ref in refs] == data
        assert seen[0] == (0, total)
        assert seen[-1] == (total, total)
        assert seen == sorted(seen)
        assert len(seen) == 61
        for name in "abc":
            assert swarm.fetched.of["received_bytes", name] > total // 10


async def test_at_most_four_requests_are_in_flight(tmp_path: Path) -> None:
    async with MemoryNetwork() as network:
        swarm = Swarm(network, tmp_path)
        data = contents(12)
        refs = refs_of(data, tmp_path)
        by_hash = {ref.sha256: content for ref, content in zip(refs, data, strict=True)}
        four_are_here = asyncio.Event()
        waiting = most = 0

        async def handle(stream: Stream) -> None:
            nonlocal waiting, most
            while True:
                request = msgpack.unpackb(await stream.receive())
                waiting += 1
                most = max(most, waiting)
                if waiting >= 4:
                    four_are_here.set()
                await four_are_here.wait()
                waiting -= 1
                await stream.send(OK)
                await stream.send(by_hash[request["sha256"]])

        transport = network.transport(PeerId("a"))
        transport.serve(BLOB_PROTOCOL, handle, max_message_bytes=1024)
        await swarm.client.fetch_all(JOB, refs, [(transport.peer, ())])
        assert most == 4


async def test_a_fetch_goes_on_where_it_was_and_repairs_what_is_corrupt(tmp_path: Path) -> None:
    async with MemoryNetwork() as network:
        swarm = Swarm(network, tmp_path)
        data = contents(10)
        refs = refs_of(data, tmp_path)
        with pytest.raises(ChunkError, match=r"1 lack it"):
            await swarm.client.fetch_all(JOB, refs, [swarm.seeder("half", data[:5])])
        for content in data[:6]:
            swarm.store.put(content)
        blob_path(swarm.store.root, refs[0]).write_bytes(b"X" * refs[0].num_bytes)
        await swarm.client.fetch_all(JOB, refs, [swarm.seeder("all", data)])
        assert [swarm.store.read(ref) for ref in refs] == data
        absent = [data[0], *data[6:]]
        assert swarm.fetched.of["received_bytes", "all"] == sum(map(len, absent))


async def test_nothing_is_asked_for_what_is_there(tmp_path: Path) -> None:
    async with MemoryNetwork() as network:
        swarm = Swarm(network, tmp_path)
        ref = swarm.store.put(b"here")
        assert await swarm.client.fetch(JOB, ref, []) == b"here"
        with pytest.raises(ChunkError, match="nobody to ask"):
            await swarm.client.fetch(JOB, BlobRef("0" * 64, 3), [])


async def test_what_came_in_this_life_is_not_read_again_to_fetch_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with MemoryNetwork() as network:
        swarm = Swarm(network, tmp_path)
        data = contents(6)
        refs = refs_of(data, tmp_path)
        seeder = swarm.seeder("a", data)
        await swarm.client.fetch_all(JOB, refs[:3], [seeder])
        read, real = list[BlobRef](), swarm.store.read
        monkeypatch.setattr(swarm.store, "read", lambda ref: (read.append(ref), real(ref))[1])
        await swarm.client.fetch_all(JOB, refs, [seeder])
        assert read == refs[3:], "what is not known is looked for"
        await swarm.client.fetch_all(JOB, refs, [])
        assert read == refs[3:]


async def test_two_halves_make_a_whole(tmp_path: Path) -> None:
    async with MemoryNetwork() as network:
        swarm = Swarm(network, tmp_path)
        data = contents(10)
        refs = refs_of(data, tmp_path)
        providers = [swarm.seeder("low", data[:5]), swarm.seeder("high", data[5:])]
        await swarm.client.fetch_all(JOB, refs, providers)
        assert all(swarm.store.has(ref) for ref in refs)
        assert swarm.fetched.of["lost", "low"] == swarm.fetched.of["bad_chunk", "low"] == 0


BAD_ANSWERS = {
    "wrong bytes": (OK, b"\x00" * 1000),
    "right bytes and one more": (OK, b"\x00" * 1001),
    "nothing": (OK, b""),
    "too much": (OK, b"\x00" * 300_000),
    "endless pieces": (OK, b"\x00" * 600, b"\x00" * 600),
    "no msgpack": (b"\xc1\xc1",),
    "no map": (msgpack.packb([1]),),
    "no status": (msgpack.packb({"x": 1}),),
    "odd status": (msgpack.packb({"status": [{}]}),),
    "a large header": (msgpack.packb({"status": "x" * 1020}),),
    "a deep header": (b"\x91" * 1000,),
}


@pytest.mark.parametrize("name", sorted(BAD_ANSWERS))
async def test_a_bad_chunk_costs_its_seeder_its_place(tmp_path: Path, name: str) -> None:
    async with MemoryNetwork() as network:
        swarm = Swarm(network, tmp_path)
        data = [bytes([1 + number]) * 1000 for number in range(20)]
        refs = refs_of(data, tmp_path)
        liar = swarm.liar("liar", *BAD_ANSWERS[name])
        await swarm.client.fetch_all(JOB, refs, [liar, swarm.seeder("good", data)])
        assert [swarm.store.read(ref) for ref in refs] == data
        assert swarm.fetched.of["bad_chunk", "liar"] == 1
        assert swarm.fetched.of["received_bytes", "liar"] == 0
        with pytest.raises(ChunkError, match="liar"):
            await swarm.client.fetch(JOB, BlobRef("0" * 64, 1000), [liar])
        assert not swarm.store.has(BlobRef("0" * 64, 1000))


async def test_a_provider_that_dies_midway_is_replaced(tmp_path: Path) -> None:
    async with MemoryNetwork() as network:
        swarm = Swarm(network, tmp_path)
        data = contents(40)
        refs = refs_of(data, tmp_path)
        providers = [swarm.seeder("dying", data), swarm.seeder("living", data)]
        steps = itertools.count()

        def kill_later(done_bytes: int, total_bytes: int) -> None:
            if next(steps) == 6:
                network.kill(PeerId("dying"))

        await swarm.client.fetch_all(JOB, refs, providers, kill_later)
        assert [swarm.store.read(ref) for ref in refs] == data
        assert swarm.fetched.of["lost", "dying"] == 1
        assert swarm.fetched.of["received_bytes", "living"] > sum(map(len, data)) // 2


async def test_all_providers_dead_is_a_lost_peer_and_what_came_before_stays(
    tmp_path: Path,
) -> None:
    async with MemoryNetwork() as network:
        swarm = Swarm(network, tmp_path)
        data = contents(40)
        refs = refs_of(data, tmp_path)
        steps = itertools.count()

        def kill_later(done_bytes: int, total_bytes: int) -> None:
            if next(steps) == 6:
                network.kill(PeerId("a"))

        with pytest.raises(PeerLostError, match=r"cannot get blob .* from 1 providers"):
            await swarm.client.fetch_all(JOB, refs, [swarm.seeder("a", data)], kill_later)
        assert 6 <= sum(swarm.store.has(ref) for ref in refs) <= 10


async def test_a_peer_that_is_not_allowed_is_refused_and_counted(tmp_path: Path) -> None:
    async with MemoryNetwork() as network:
        swarm = Swarm(network, tmp_path)
        data = contents(3)
        refs = refs_of(data, tmp_path)
        closed = swarm.seeder("closed", data, allow=False)
        with pytest.raises(RefusedError, match=f"job {JOB}"):
            await swarm.client.fetch(JOB, refs[0], [closed])
        assert swarm.served.of["refused", ME] == 1
        assert swarm.served.of["sent_bytes", ME] == 0
        assert swarm.fetched.of["refused", "closed"] == 1
        opened = swarm.seeder("open", data)
        await swarm.client.fetch_all(JOB, refs, [closed, opened])
        with pytest.raises(RefusedError):
            await swarm.client.fetch(JobId("another"), BlobRef("0" * 64, 1), [opened])


async def test_a_seeder_with_a_corrupt_disk_says_so_and_drops_the_blob(tmp_path: Path) -> None:
    async with MemoryNetwork() as network:
        swarm = Swarm(network, tmp_path)
        data = contents(2)
        refs = refs_of(data, tmp_path)
        rotten, sound = swarm.seeder("rotten", data), swarm.seeder("sound", data)
        path = blob_path(tmp_path / "rotten", refs[1])
        path.write_bytes(b"y" * refs[1].num_bytes)
        await swarm.client.fetch_all(JOB, refs, [rotten, sound])
        await swarm.client.fetch_all(JOB, refs, [sound])
        swarm.store.remove(refs[1])
        with pytest.raises(ChunkError, match="1 lack it"):
            await swarm.client.fetch(JOB, refs[1], [rotten])
        assert not path.exists()
        assert swarm.fetched.of["bad_chunk", "rotten"] == 0


async def test_a_silent_provider_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blob_protocol, "MIN_TIMEOUT_S", 0.05)
    monkeypatch.setattr(blob_protocol, "MIN_BYTES_PER_S", 1e9)
    async with MemoryNetwork() as network:
        swarm = Swarm(network, tmp_path)
        (ref,) = refs_of(contents(1), tmp_path)
        with pytest.raises(PeerLostError, match="no blob in"):
            await swarm.client.fetch(JOB, ref, [swarm.liar("silent")])
        assert swarm.fetched.of["lost", "silent"] == 1


async def test_a_full_disk_ends_the_fetch_with_a_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with MemoryNetwork() as network:
        swarm = Swarm(network, tmp_path)
        data = contents(8)
        refs = refs_of(data, tmp_path)
        (tmp_path / "me" / "partial").rmdir()
        (tmp_path / "me" / "partial").write_bytes(b"in the way")
        with pytest.raises(SwarmError, match="cannot store") as caught:
            await swarm.client.fetch_all(JOB, refs, [swarm.seeder("a", data)])
        assert type(caught.value) is SwarmError
        assert not any(swarm.store.has(ref) for ref in refs)


async def test_a_cancelled_fetch_stops_at_once(tmp_path: Path) -> None:
    async with MemoryNetwork() as network:
        swarm = Swarm(network, tmp_path)
        (ref,) = refs_of(contents(1), tmp_path)
        silent = swarm.liar("silent")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await swarm.client.fetch(JOB, ref, [silent])
        assert swarm.fetched.of["lost", "silent"] == 0


# ---- the server against strangers ---------------------------------------------------------------

GOOD = {"job": JOB, "sha256": "0" * 64, "num_bytes": 5}


@pytest.mark.parametrize(
    "request_bytes",
    [b"", b"\xc1", b"\x93", msgpack.packb([1]), msgpack.packb({}), msgpack.packb(GOOD | {"x": 1}),
     msgpack.packb(GOOD | {"num_bytes": -1}), msgpack.packb(GOOD | {"num_bytes": 1 << 40}),
     msgpack.packb(GOOD | {"num_bytes": True}), msgpack.packb(GOOD | {"sha256": b"0" * 64}),
     msgpack.packb(GOOD | {"job": None}), msgpack.packb({1: 2})],
)  # fmt: skip
async def test_a_malformed_request_ends_the_stream_and_is_counted(
    tmp_path: Path, request_bytes: bytes
) -> None:
    async with MemoryNetwork() as network:
        swarm = Swarm(network, tmp_path)
        peer, addresses = swarm.seeder("a", [b"hello"])
        stream = await network.transport(ME).open(
            peer, addresses, BLOB_PROTOCOL, max_message_bytes=1024
        )
        await stream.send(request_bytes)
        with pytest.raises((PeerLostError, EndOfStream)):
            await stream.receive()
        assert swarm.served.of["malformed", ME] == 1


@pytest.mark.parametrize(
    "sha256", ["../me/secret", "/etc/passwd", "..", "", "0" * 63, "A" * 64, "0" * 64]
)
async def test_no_name_leads_out_of_the_store(tmp_path: Path, sha256: str) -> None:
    async with MemoryNetwork() as network:
        swarm = Swarm(network, tmp_path)
        (tmp_path / "me" / "secret").write_bytes(b"12345")
        peer, addresses = swarm.seeder("a", [b"hello"])
        stream = await network.transport(ME).open(
            peer, addresses, BLOB_PROTOCOL, max_message_bytes=1024
        )
        await stream.send(msgpack.packb(GOOD | {"sha256": sha256}))
        assert msgpack.unpackb(await stream.receive()) == {"status": "missing"}
        assert swarm.served.of["missing", ME] == 1


async def test_a_peer_has_a_bounded_number_of_streams(tmp_path: Path) -> None:
    async with MemoryNetwork() as network:
        swarm = Swarm(network, tmp_path)
        (ref,) = refs_of([b"hello"], tmp_path)
        peer, addresses = swarm.seeder("a", [b"hello"])
        request = msgpack.packb({"job": JOB, "sha256": ref.sha256, "num_bytes": 5})
        streams = []
        for _ in range(MAX_STREAMS_PER_PEER + 1):
            streams.append(
                await network.transport(ME).open(
                    peer, addresses, BLOB_PROTOCOL, max_message_bytes=1024
                )
            )
            if len(streams) <= MAX_STREAMS_PER_PEER:
                await streams[-1].send(request)
                assert await streams[-1].receive() == OK
        with pytest.raises((PeerLostError, EndOfStream)):
            await streams[-1].receive()
        for stream in streams[:-1]:
            assert await stream.receive() == b"hello"
            await stream.reset()
        await asyncio.sleep(0)
        assert await swarm.client.fetch(JOB, ref, [(peer, addresses)]) == b"hello"


@settings(deadline=None, max_examples=25)
@given(answers=st.lists(st.binary(max_size=60), min_size=1, max_size=3))
def test_any_answers_end_in_an_error_of_ours(
    answers: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")

    async def scenario() -> None:
        async with MemoryNetwork() as network:
            swarm = Swarm(network, folder)
            ref = BlobRef("0" * 64, 50)
            with pytest.raises((ChunkError, PeerLostError, RefusedError)):
                await swarm.client.fetch(JOB, ref, [swarm.liar("liar", *answers)])
            assert not swarm.store.has(ref)

    asyncio.run(scenario())
