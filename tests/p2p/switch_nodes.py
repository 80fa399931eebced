"""Switches on a network in memory, and the frames that they route, for tests on a virtual clock."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import async_solipsism

from swarmnode.domain import Generation, JobId, PeerId, Plan, SlotId
from swarmnode.messages import (
    Frame,
)
from swarmnode.p2p.memory import MemoryNetwork
from swarmnode.p2p.ports import Stream
from swarmnode.p2p.switch import Switch, TensorMessage
from swarmnode.session_messages import (
    Sampling,
    SessionClose,
    SessionFailed,
    SessionFrame,
    SessionToken,
)
from swarmnode.wire import MAX_TENSOR_BYTES, TENSOR_PROTOCOL

ResultT = TypeVar("ResultT")
JOB = JobId("0123456789abcdef")
LARGE_BYTES = 8 << 20
"""Two of these fill a stream's window."""
A, B, C, HEAD, STRANGER = (PeerId(name) for name in ("a", "b", "c", "head", "stranger"))


def virtual(scenario: Coroutine[Any, Any, ResultT]) -> ResultT:
    with asyncio.Runner(loop_factory=async_solipsism.EventLoop) as runner:
        return runner.run(scenario)


def plan(*rows: str, generation: int = 1) -> Plan:
    """Each row is a stage; each letter in it the host of a slot."""
    slots = tuple(tuple(PeerId(name) for name in row) for row in rows or ("a", "b"))
    layers = tuple((stage, stage + 1) for stage in range(len(slots)))
    return Plan(Generation(generation), layers, slots, HEAD)


def frame(source: int, target: int, *, generation: int = 1, slot: int = 0, mb: int = 0) -> Frame:
    """An activation from one stage to another."""
    return Frame(
        job=JOB,
        generation=Generation(generation),
        step=0,
        kind="activation",
        source=SlotId(source, 0),
        target=SlotId(target, slot),
        microbatch=mb,
        group=0,
        part=0,
        shape=(1,),
    )


def piece(target: int) -> SessionFrame:
    return SessionFrame(JOB, Generation(1), "s", SlotId(target, 0), 0, 1, (1, 1), Sampling(), 8)


CLOSE = SessionClose(JOB, Generation(1), "s", SlotId(1, 0))
TOKEN = SessionToken(JOB, Generation(1), "s", 1, 7, -0.5)
FAILED = SessionFailed(JOB, Generation(1), "s", "no room")


class Node:
    """A switch with what it delivered, dropped and sent."""

    def __init__(self, network: MemoryNetwork, peer: PeerId, group: asyncio.TaskGroup) -> None:
        self.transport = network.transport(peer)
        self.dropped: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.worker: list[tuple[TensorMessage, bytes]] = []
        self.head: list[tuple[TensorMessage, bytes]] = []
        self.broken: list[tuple[PeerId, str]] = []
        self.is_broken = asyncio.Event()
        self.transfers: list[tuple[PeerId, int, float]] = []
        self.switch = Switch(
            self.transport,
            group,
            lambda why: self.dropped.update([why]),
            self._on_sent,
            lambda *transfer: self.transfers.append(transfer),
            asyncio.get_running_loop().time,
        )

    def _on_sent(self, kind: str, num_bytes: int) -> None:
        self.sent[kind] += num_bytes

    def join(self, plan: Plan, *, worker: bool = True, head: bool = False) -> None:
        async def to_worker(message: TensorMessage, payload: Any) -> None:
            self.worker.append((message, bytes(payload)))

        async def to_head(message: TensorMessage, payload: Any) -> None:
            self.head.append((message, bytes(payload)))

        self.switch.join(
            JOB,
            plan,
            to_worker=to_worker if worker else None,
            to_head=to_head if head else None,
            on_broken=self._on_broken,
        )

    def _on_broken(self, peer: PeerId, reason: str) -> None:
        self.broken.append((peer, reason))
        self.is_broken.set()

    async def stream_to(self, other: "Node") -> Stream:
        return await self.transport.open(
            other.transport.peer, (), TENSOR_PROTOCOL, max_message_bytes=MAX_TENSOR_BYTES
        )


class Swarm:
    """A network with switches on demand."""

    def __init__(self, network: MemoryNetwork, group: asyncio.TaskGroup) -> None:
        self.network, self._group = network, group

    def node(self, peer: PeerId, plan: Plan | None = None, **roles: bool) -> Node:
        node = Node(self.network, peer, self._group)
        if plan is not None:
            node.join(plan, **roles)
        return node


@asynccontextmanager
async def swarm() -> AsyncIterator[Swarm]:
    """Ends every lane with the block."""
    async with MemoryNetwork() as network, asyncio.TaskGroup() as group:
        yield Swarm(network, group)
        for task in asyncio.all_tasks():
            if task.get_name().startswith("tensors to "):
                task.cancel()


async def settle() -> None:
    """Let everything happen that needs no time."""
    await asyncio.sleep(0.001)


async def never_read(_stream: Stream) -> None:
    await asyncio.Event().wait()
