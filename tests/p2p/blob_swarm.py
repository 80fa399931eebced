"""Seeders on a network in memory, liars among them, and somebody who fetches from them."""

from collections import Counter
from pathlib import Path

import msgpack

from swarmnode.domain import BlobRef, JobId, PeerId
from swarmnode.p2p.blob_server import serve_blobs
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.blobs import BlobClient, Provider
from swarmnode.p2p.memory import MemoryNetwork
from swarmnode.p2p.ports import Stream
from swarmnode.wire import BLOB_PROTOCOL

JOB = JobId("0123456789abcdef")
ME = PeerId("me")


class Counts:
    """Sums what was counted, by event and peer."""

    def __init__(self) -> None:
        self.of: Counter[tuple[str, str]] = Counter()

    def __call__(self, event: str, peer: PeerId, amount: int) -> None:
        self.of[event, peer] += amount


class Swarm:
    """Some seeders on an in-memory network, and an empty store that fetches from them."""

    def __init__(self, network: MemoryNetwork, folder: Path) -> None:
        self.network = network
        self.folder = folder
        self.store = BlobStore(folder / "me")
        self.served = Counts()
        self.fetched = Counts()
        self.client = BlobClient(network.transport(ME), self.store, self.fetched)

    def seeder(
        self,
        name: str,
        contents: list[bytes],
        *,
        allow: bool = True,
        upload_bytes_per_s: float | None = None,
    ) -> Provider:
        transport = self.network.transport(PeerId(name))
        store = BlobStore(self.folder / name)
        for content in contents:
            store.put(content)
        serve_blobs(
            transport,
            store,
            lambda peer, job: allow and job == JOB,
            self.served,
            upload_bytes_per_s=upload_bytes_per_s,
        )
        return (transport.peer, transport.addresses)

    def liar(self, name: str, *answers: bytes) -> Provider:
        """A peer that answers every request with the same messages."""
        transport = self.network.transport(PeerId(name))

        async def handle(stream: Stream) -> None:
            while True:
                await stream.receive()
                for answer in answers:
                    await stream.send(answer)

        transport.serve(BLOB_PROTOCOL, handle, max_message_bytes=1 << 20)
        return (transport.peer, transport.addresses)


def contents(num_blobs: int, num_bytes: int = 1000) -> list[bytes]:
    return [bytes([number % 256]) * (num_bytes + number) for number in range(num_blobs)]


def refs_of(data: list[bytes], folder: Path) -> list[BlobRef]:
    store = BlobStore(folder / "reference")
    return [store.put(content) for content in data]


OK = msgpack.packb({"status": "ok"})
