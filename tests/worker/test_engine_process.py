"""The child as a process: it answers over its pipe, and ends when the pipe does."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from engine_swarm import PLACEMENTS, Swarm, make_manifest

from swarmnode.children import Child, python_module, spawn_child
from swarmnode.domain import Generation, PeerId
from swarmnode.engine_messages import (
    Base,
    Busy,
    Coded,
    Configured,
    EngineMessage,
    LivenessCheck,
    Warm,
)
from swarmnode.messages import (
    Applied,
    Begin,
    Commit,
    Message,
    Ready,
)
from swarmnode.wire import pack, unpack_local

pytestmark = pytest.mark.processes


async def receive(child: Child, kind: type[Any]) -> Any:
    """The next message of a type; reports of business may come in between."""
    while True:
        async with asyncio.timeout(60):
            message, _ = unpack_local(await child.receive())
        if isinstance(message, kind):
            return message
        assert isinstance(message, Busy | Coded | Applied | Ready | Warm), message


async def test_a_child_trains_as_an_engine_does_and_ends_with_its_pipe(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path)
    swarm = Swarm(manifest, PLACEMENTS["one"], tmp_path, generation=0)
    swarm.configure()
    expected = [swarm.step(step).hashes for step in range(3)]

    log = tmp_path / "child.log"
    child = spawn_child(python_module("swarmnode.worker.engine"), name="worker", log=log)
    try:

        async def tell(message: Message | EngineMessage, payload: bytes = b"") -> None:
            await child.send(pack(message), payload)

        bases = (Base(0, "init", 0), Base(1, "init", 0))
        await child.send(b"\x00\x00\x00\x01garbage")  # left out, not fatal
        await tell(swarm.configuration(PeerId("a"), 0, bases), manifest.canonical())
        assert (await receive(child, Configured)).step == 0
        for step in range(3):
            await tell(Begin(manifest.job, Generation(1), step))
            squares: dict[int, float] = {}
            for _ in range(4):
                squares.update((await receive(child, Ready)).sums_of_squares)
            scale = min(1.0, 0.5 / (sum(squares.values()) ** 0.5 + 1e-6))
            await tell(Commit(manifest.job, Generation(1), step, scale))
            applied = [await receive(child, Applied) for _ in range(2)]
            assert {a.stage: a.state_hash for a in applied} == expected[step]
    finally:
        status = await child.stop()
    assert status == 0
    assert "left out" in log.read_text()


async def test_a_child_answers_whether_it_is_alive_in_its_turn(tmp_path: Path) -> None:
    """Behind what it was told before; also when it was told nothing, or what it cannot do."""
    manifest = make_manifest(tmp_path)
    swarm = Swarm(manifest, PLACEMENTS["one"], tmp_path, generation=0)
    good = swarm.configuration(PeerId("a"), 0, (Base(0, "init", 0), Base(1, "init", 0)))
    log = tmp_path / "child.log"
    child = spawn_child(python_module("swarmnode.worker.engine"), name="worker", log=log)

    async def answers() -> list[str]:
        """The kinds of message up to the answer."""
        await child.send(pack(LivenessCheck()))
        kinds: list[str] = []
        while "Alive" not in kinds:
            async with asyncio.timeout(60):
                message, _ = unpack_local(await child.receive())
            kinds.append(type(message).__name__)
        return kinds

    try:
        assert await answers() == ["Warm", "Alive"]
        await child.send(pack(good), b"no manifest")
        assert await answers() == ["Failed", "Alive"]
        await child.send(pack(good), manifest.canonical())
        assert await answers() == ["Configured", "Alive"]
    finally:
        await child.stop()
