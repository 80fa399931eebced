"""The child against a peer of the plan that sends and sends: its memory, its orders, its work."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from engine_swarm import PLACEMENTS, WIDE, Swarm, make_manifest

from swarmnode.children import Child, python_module, spawn_child
from swarmnode.domain import Generation, PeerId, SlotId
from swarmnode.engine_messages import Alive, Base, Configured, LivenessCheck, Warm
from swarmnode.manifest import CodecConfig, Manifest
from swarmnode.messages import Begin, Frame
from swarmnode.wire import pack, unpack_local


@dataclass
class Weighed(Swarm):
    """Adds up what each slot sends to each other node."""

    sent_bytes: Counter[tuple[PeerId, SlotId]] = field(default_factory=Counter)

    def _deliver(self, sender: PeerId, message: Any, payload: memoryview) -> None:
        if isinstance(message, Frame):
            self.sent_bytes[self.plan.host(message.target), message.source] += len(payload)
        super()._deliver(sender, message, payload)


@pytest.mark.parametrize("placement", ["four", "three"])
@pytest.mark.parametrize(
    "codecs",
    [
        CodecConfig(activation="none", activation_gradient="none"),
        CodecConfig(activation="aq/int4/32", gradient="topk64of4096/int4+ef"),
        CodecConfig(
            activation="none", activation_gradient="none", sync="diloco,every=3,topology=everyone"
        ),
    ],
    ids=["plain", "changes", "gathered"],
)
def test_an_honest_slot_never_has_too_much_on_its_way(
    tmp_path: Path, placement: str, codecs: CodecConfig
) -> None:
    manifest = make_manifest(tmp_path, WIDE, codecs=codecs, num_microbatches=12)
    swarm = Weighed(manifest, PLACEMENTS[placement], tmp_path)
    swarm.configure()
    swarm.evaluate(0)
    swarm.step(0)
    assert swarm.sent_bytes
    for (host, _), num_bytes in swarm.sent_bytes.items():
        assert 2 * num_bytes <= swarm.engines[host].expected_bytes


@contextlib.asynccontextmanager
async def importing_child(log: Path) -> AsyncIterator[Child]:
    """A child that handles nothing for the seconds that its imports take."""
    child = spawn_child(python_module("swarmnode.worker.engine"), name="worker", log=log)
    try:
        yield child
    finally:
        await child.stop()


async def next_message(child: Child) -> Any:
    async with asyncio.timeout(60):
        return unpack_local(await child.receive())[0]


def status_bytes(child: Child, field: str) -> int:
    """A field of the kernel's account of the child, such as VmHWM: the most that it ever had."""
    lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def activation(manifest: Manifest) -> Frame:
    """What the child of peer c gets from a in the first step."""
    return Frame(
        manifest.job,
        Generation(1),
        0,
        "activation",
        SlotId(0, 0),
        SlotId(1, 0),
        0,
        0,
        0,
        (2, 16, 32),
    )


@pytest.mark.processes
async def test_a_flood_takes_bounded_memory_and_holds_up_no_order(tmp_path: Path) -> None:
    frame, payload = activation(make_manifest(tmp_path)), bytes(8 << 20)
    async with importing_child(tmp_path / "child.log") as child:
        async with asyncio.timeout(60):
            for number in range(64):
                await child.send(pack(replace(frame, microbatch=number)), payload)
            await child.send(pack(LivenessCheck()))
        assert [type(await next_message(child)) for _ in range(2)] == [Warm, Alive]
        most_bytes, now_bytes = status_bytes(child, "VmHWM"), status_bytes(child, "VmRSS")
    assert most_bytes - now_bytes < 160 << 20


@pytest.mark.processes
async def test_work_gets_its_turn_between_messages(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path)
    swarm = Swarm(manifest, PLACEMENTS["four"], tmp_path, generation=1)
    configure = swarm.configuration(PeerId("a"), 0, (Base(0, "init", 0),))
    num_checks, num_answers = 20_000, 0
    async with importing_child(tmp_path / "child.log") as child:
        await child.send(pack(configure), manifest.canonical())
        await child.send(pack(Begin(manifest.job, Generation(1), 0)))
        sending = asyncio.create_task(send_checks(child, num_checks))
        while not isinstance(message := await next_message(child), Frame):
            assert isinstance(message, Warm | Configured | Alive), message
            num_answers += isinstance(message, Alive)
        sending.cancel()
        await asyncio.wait((sending,))
    assert num_answers < num_checks


async def send_checks(child: Child, count: int) -> None:
    for _ in range(count):
        await child.send(pack(LivenessCheck()))
