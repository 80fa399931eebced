"""A node that works for jobs, stands by for them and may take them over, as `Services` ties it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from worker_node import ME, SUBMITTER, Node, answer, manifest

from swarmnode.coordinator.events import Record, StartedRecord, SubmittedRecord
from swarmnode.coordinator.journal import _line
from swarmnode.coordinator.runner import RunnerTools
from swarmnode.coordinator.service import CoordinatorService
from swarmnode.coordinator.solving import Solver
from swarmnode.coordinator.succession import Succession
from swarmnode.domain import Generation, Plan
from swarmnode.manifest import Manifest
from swarmnode.messages import Adopt, Adopted, Answer, Entry, Inquire, Release
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.memory import MemoryNetwork
from swarmnode.p2p.ports import Stream
from swarmnode.services import Services
from swarmnode.telemetry import Metrics
from swarmnode.tokenizer import write_byte_tokenizer
from swarmnode.wire import pack
from tests.coordinator.bench import FACTS

ADOPTED = Plan(
    Generation(1), ((0, 1),), ((SUBMITTER.peer,),), SUBMITTER.peer, voters=(SUBMITTER.peer, ME.peer)
)
"""The submitter computes and coordinates; this node is its first standby."""


class StandbyNode(Node):
    """A worker service with what takes a job over."""

    def __init__(self, folder: Path, network: MemoryNetwork, group: asyncio.TaskGroup) -> None:
        super().__init__(
            folder, network, group,
            log=lambda event, **facts: self._log(event, **facts),
            on_entry=lambda *entry: self.succession.entry(*entry),
            num_lines=lambda job: self.succession.num_lines(job),
            on_orphaned=lambda job: self.succession.orphaned(job),
            on_named=lambda job: self.succession.named(job),
            on_followed=lambda job: self.succession.followed(job),
            on_adopted=lambda *adopted: self.succession.adopted(*adopted),
        )  # fmt: skip
        self.metrics = Metrics(version="0", peer=ME.peer)
        tools = RunnerTools(
            transport=network.transport(ME.peer),
            store=self.store,
            blobs=self.tools.blobs,
            switch=self.tools.switch,
            peers=lambda: (),
            on_sent=lambda *_: None,
            on_changed=partial(Services._observe_job, self),  # type: ignore[arg-type]
            log=self._log,
            solver=Solver(folder / "solver.log"),
            links=lambda: (),
        )

        async def facts_of(*_: Any) -> Any:
            raise AssertionError("nothing is submitted here")

        self.coordinator = CoordinatorService(ME, folder / "led", tools, group, facts_of)
        self.succession = Succession(
            ME.peer, self.coordinator.standby, self.store, self.tools.blobs, self.service.papers,
            self.coordinator.take_over, self.coordinator.retention.forget, self.service.stand_by,
            group, self._log,
        )  # fmt: skip

    async def restore(self) -> None:
        """Take up what earlier lives left, as a daemon does."""
        await self.coordinator.restore()
        await self.service.restore()


@asynccontextmanager
async def standby(folder: Path) -> AsyncIterator[StandbyNode]:
    """One life; what ends the daemon's services comes out of it."""
    async with MemoryNetwork() as network:

        async def live(ready: asyncio.Future[StandbyNode]) -> None:
            async with asyncio.TaskGroup() as group:
                ready.set_result(StandbyNode(folder, network, group))
                await asyncio.Event().wait()

        async with asyncio.TaskGroup() as outside:
            ready = asyncio.get_running_loop().create_future()
            life = outside.create_task(live(ready))
            found = await ready
            yield found
            for host in found.service.hosts():  # they would wait for another coordinator
                host.end()
            life.cancel()


def signed(tokenizer: Any, store: BlobStore, **changes: Any) -> Manifest:
    """A job of the submitter with what it gives out as its tokenizer."""
    data = tokenizer if isinstance(tokenizer, bytes) else json.dumps(tokenizer).encode()
    return manifest(tokenizer=store.put(data), data=None, **changes)


def question(job: Manifest, generation: int) -> Inquire:
    signature = SUBMITTER.sign(job.canonical())
    return Inquire(job.job, Generation(generation), Generation(0), 0, signature)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - threads and disks have no event
            await asyncio.sleep(0.005)


class Submitter:
    """Talks to the node as a coordinator does."""

    def __init__(self, stream: Stream, job: Manifest, generation: int) -> None:
        self._stream, self._job, self._generation = stream, job, Generation(generation)
        self._num_lines = 0

    @classmethod
    async def begin(cls, node: StandbyNode, job: Manifest, generation: int = 1) -> "Submitter":
        """Open a stream with a question, which is granted."""
        stream = await node.stream()
        inquire = question(job, generation)
        await stream.send(pack(inquire), job.canonical())
        said = await answer(stream)
        assert isinstance(said, Answer)
        assert said.granted
        return cls(stream, job, generation)

    async def ask(self) -> None:
        """Ask again, and hear that everything before has been taken."""
        await self._stream.send(pack(question(self._job, self._generation)))
        assert isinstance(await answer(self._stream), Answer)

    async def release(self) -> None:
        await self._stream.send(pack(Release(self._job.job, "done")))

    async def adopt(self, plan: Plan = ADOPTED) -> None:
        await self._stream.send(pack(Adopt(self._job.job, plan)))
        assert isinstance(await answer(self._stream), Adopted)

    async def tell(self, *records: Record) -> None:
        await self.tell_lines(b"".join(map(_line, records)), len(records))

    async def tell_lines(self, lines: bytes, num_lines: int = 1) -> None:
        entry = Entry(self._job.job, self._generation, self._num_lines, lines)
        self._num_lines += num_lines
        await self._stream.send(pack(entry))

    async def hang_up(self) -> None:
        await self._stream.reset()


def byte_tokenizer(folder: Path) -> dict[str, str]:
    """The files of a sound tokenizer."""
    write_byte_tokenizer(folder / "tokenizer")
    return {path.name: path.read_text() for path in sorted((folder / "tokenizer").iterdir())}


FIRST, STARTED = SubmittedRecord(FACTS), StartedRecord.of(ADOPTED, 0)
