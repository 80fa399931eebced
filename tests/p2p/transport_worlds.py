"""Two worlds in which the transport's promises are tested: in memory, and over libp2p."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from swarmnode.domain import PeerId
from swarmnode.p2p.memory import MemoryNetwork
from swarmnode.p2p.ports import Stream, Transport
from swarmnode.p2p.streams import Libp2pTransport

MAX_MESSAGE_BYTES = 128 << 20
MEBIBYTE = 1 << 20
LOOPBACK = ["/ip4/127.0.0.1/tcp/0"]


@dataclass
class Victim:
    """A peer that the test may kill. Serves /echo/1 and /hold/1."""

    peer: PeerId
    addresses: list[str]
    kill: Callable[[], None]


@dataclass
class World:
    """Two peers, and a third one on demand."""

    here: Transport
    there: Transport
    victim: Callable[[], AbstractAsyncContextManager[Victim]]

    async def open(self, protocol: str, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> Stream:
        """Open a stream from `here` to `there`."""
        return await self.here.open(
            self.there.peer,
            self.there.addresses,
            protocol,
            max_message_bytes=max_message_bytes,
        )

    async def pair(self) -> tuple[Stream, Stream]:
        """Return both ends of a stream; the far one lives until the world ends."""
        accepted: asyncio.Future[Stream] = asyncio.get_running_loop().create_future()

        async def handler(stream: Stream) -> None:
            accepted.set_result(stream)
            await asyncio.Event().wait()

        self.there.serve("/pair/1", handler, max_message_bytes=MAX_MESSAGE_BYTES)
        ours = await self.open("/pair/1")
        return ours, await accepted


@asynccontextmanager
async def memory_world() -> AsyncIterator[World]:
    async with MemoryNetwork() as network:

        @asynccontextmanager
        async def victim() -> AsyncIterator[Victim]:
            peer = PeerId("victim")
            transport = network.transport(peer)
            transport.serve("/echo/1", echo, max_message_bytes=MAX_MESSAGE_BYTES)
            transport.serve("/hold/1", hold, max_message_bytes=MAX_MESSAGE_BYTES)
            yield Victim(peer, list(transport.addresses), lambda: network.kill(peer))

        yield World(network.transport(PeerId("a")), network.transport(PeerId("b")), victim)


@asynccontextmanager
async def libp2p_world() -> AsyncIterator[World]:
    async with (
        Libp2pTransport.start(b"a" * 32, LOOPBACK) as here,
        Libp2pTransport.start(b"b" * 32, LOOPBACK) as there,
    ):
        yield World(here, there, victim_process)


@asynccontextmanager
async def victim_process() -> AsyncIterator[Victim]:
    """A real process that dies by SIGKILL."""
    script = Path(__file__).with_name("victim_peer.py")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        script,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        assert process.stdout is not None
        where = json.loads(await process.stdout.readline())
        yield Victim(PeerId(where["peer"]), where["addresses"], process.kill)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive())


async def hold(stream: Stream) -> None:
    await asyncio.Event().wait()


async def send_until_blocked(stream: Stream, sent: list[bytes]) -> None:
    """Send distinct messages of 1 MiB for ever; those that went out are in `sent`."""
    while True:
        message = len(sent).to_bytes(4, "big") * (MEBIBYTE // 4)
        await stream.send(message)
        sent.append(message)


async def wait_blocked(sent: list[bytes]) -> None:
    """Return when nothing has gone out for half a second."""
    num_sent = -1
    while num_sent != len(sent):
        num_sent = len(sent)
        await asyncio.sleep(0.5)


WORLDS = {"memory": memory_world, "libp2p": libp2p_world}
