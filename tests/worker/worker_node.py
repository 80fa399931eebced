"""A worker service on a network in memory, and what coordinators send it."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from swarmnode.domain import BlobRef, Generation, PeerId, Plan
from swarmnode.errors import PeerLostError
from swarmnode.heartbeats import Ping
from swarmnode.manifest import DataContent, Manifest, ModelContent, PlacementConfig
from swarmnode.messages import (
    Answer,
    Assign,
    Inquire,
    LinkReport,
    Message,
    StateSource,
)
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.blobs import BlobClient
from swarmnode.p2p.identity import Identity
from swarmnode.p2p.memory import MemoryNetwork
from swarmnode.p2p.ports import EndOfStream, Stream
from swarmnode.p2p.switch import Switch
from swarmnode.wire import CONTROL_PROTOCOL, MAX_CONTROL_BYTES, pack, unpack
from swarmnode.worker.nursery import Nursery
from swarmnode.worker.service import WorkerService
from swarmnode.worker.tools import HostTools

ME, SUBMITTER, STRANGER = (Identity(letter * 32) for letter in (b"m", b"s", b"x"))
NOWHERE = BlobRef("0" * 64, 1)
"""Content that nobody has: an accepted job asks for it, fails, and starts no child."""


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "name": "job",
        "placement": PlacementConfig(stages=1),
        "model": ModelContent(config={"model_type": "llama"}),
        "data": DataContent(train=NOWHERE, validation=NOWHERE),
        "tokenizer": NOWHERE,
        "submitter": SUBMITTER.peer,
        "submitted_at_s": 1.0,
    }
    return Manifest(**{**fields, **changes})


GOOD = manifest()


def plan(host: PeerId = ME.peer, coordinator: PeerId = SUBMITTER.peer, generation: int = 1) -> Plan:
    return Plan(Generation(generation), ((0, 1),), ((host,),), coordinator)


def assign(job: Manifest = GOOD, **changes: Any) -> Assign:
    fields: dict[str, Any] = {
        "job": job.job,
        "plan": plan(),
        "step": 0,
        "sources": ((0, StateSource("init")),),
        "signature": SUBMITTER.sign(job.canonical()),
    }
    return Assign(**{**fields, **changes})


class Node:
    """A worker service on a network in memory, and the peers that assign."""

    def __init__(
        self, folder: Path, network: MemoryNetwork, group: asyncio.TaskGroup, **hooks: Any
    ) -> None:
        self.network = network
        self.dropped: Counter[str] = Counter()
        self.logged: list[tuple[str, dict[str, object]]] = []
        self.was_logged = asyncio.Event()
        self.folder = folder
        self.links: tuple[LinkReport, ...] = ()
        transport = network.transport(ME.peer)
        self.store = store = BlobStore(folder / "blobs")
        self.tools = tools = HostTools(
            me=ME.peer,
            incarnation=1,
            directory=folder / "jobs",
            store=store,
            blobs=BlobClient(transport, store),
            switch=Switch(transport, group, self._count, lambda _kind, _bytes: None),
            device="cpu",
            num_threads=1,
            nursery=Nursery(1, folder / "worker.log"),
            child_hang_s=100.0,
            on_sent=lambda _kind, _bytes: None,
            on_compute=lambda _seconds: None,
            links=lambda: self.links,
            **hooks,
        )
        self.service = WorkerService(transport, tools, group, self._count, self._log)

    def _count(self, why: str) -> None:
        self.dropped[why] += 1

    def _log(self, event: str, **fields: object) -> None:
        self.logged.append((event, fields))
        self.was_logged.set()

    async def logs(self, event: str) -> dict[str, object]:
        """The fields of the newest log line of this event, as soon as there is one."""
        async with asyncio.timeout(5):
            while not (found := [fields for name, fields in self.logged if name == event]):
                self.was_logged.clear()
                await self.was_logged.wait()
        return found[-1]

    async def stream(self, sender: Identity = SUBMITTER) -> Stream:
        transport = self.network.transport(sender.peer)
        return await transport.open(
            ME.peer, (), CONTROL_PROTOCOL, max_message_bytes=MAX_CONTROL_BYTES
        )

    async def is_refused(self, sender: Identity, *parts: bytes) -> str:
        """Send one message, see the stream end without an answer; returns the reason logged."""
        stream = await self.stream(sender)
        await stream.send(*parts)
        async with asyncio.timeout(5):
            with pytest.raises((EndOfStream, PeerLostError)):
                await stream.receive()
        assert self.service.hosts() == ()
        assert self.dropped == {"bad_assignment": 1}
        assert [name for name, _ in self.logged] == ["assignment refused"]
        assert not (self.folder / "jobs").exists()
        (_, fields) = self.logged[0]
        assert fields["peer"] == sender.peer
        return str(fields["reason"])


@asynccontextmanager
async def node(folder: Path, **hooks: Any) -> AsyncIterator[Node]:
    async with MemoryNetwork() as network, asyncio.TaskGroup() as group:
        found = Node(folder, network, group, **hooks)
        yield found
        for host in found.service.hosts():  # they would wait for another coordinator
            host.end()


async def answer(stream: Stream) -> Message:
    """The next message that is no heartbeat."""
    async with asyncio.timeout(30):
        while True:
            message, _ = unpack(await stream.receive())
            if not isinstance(message, Ping):
                return message


def inquire(generation: int, based_on: int, job: Manifest = GOOD, **changes: Any) -> Inquire:
    fields: dict[str, Any] = {
        "job": job.job,
        "generation": Generation(generation),
        "based_on": Generation(based_on),
        "num_lines": 0,
        "signature": SUBMITTER.sign(job.canonical()),
    }
    return Inquire(**{**fields, **changes})


async def ask(n: Node, sender: Identity, message: Message, job: Manifest = GOOD) -> Stream:
    stream = await n.stream(sender)
    await stream.send(pack(message), job.canonical())
    return stream


async def answered(stream: Stream) -> Answer:
    found = await answer(stream)
    assert isinstance(found, Answer), found
    return found
