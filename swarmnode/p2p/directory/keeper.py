"""A directory that is started again when its child, or the Go daemon below it, has ended."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

from swarmnode.errors import ChildError, PeerLostError, SwarmError
from swarmnode.p2p.directory.client import Directory

MAX_PAUSE_S = 60.0
OpenDirectory = Callable[[int, Sequence[str]], AbstractAsyncContextManager[Directory]]
"""Starts a directory on a port, 0 is any free one; also joins through these addresses."""


class KeptDirectory:
    """What `Directory` offers, over one life of its child after another, on one port."""

    def __init__(self, open_directory: OpenDirectory, log: Callable[..., None]) -> None:
        self._open_directory = open_directory
        self._log = log
        self._stack = AsyncExitStack()
        self._directory: Directory
        self._neighbours: tuple[str, ...] = ()
        """Who was there: a later life joins through them, as the bootstrap peers may be gone."""

    @classmethod
    @asynccontextmanager
    async def start(
        cls, open_directory: OpenDirectory, port: int, log: Callable[..., None]
    ) -> "AsyncIterator[KeptDirectory]":
        """Start it once, raising what that raises; from then on keep it going."""
        kept = cls(open_directory, log)
        await kept._open(port)
        try:
            async with asyncio.TaskGroup() as group:
                keeping = group.create_task(kept._keep(), name="directory keeper")
                try:
                    yield kept
                finally:
                    keeping.cancel()
        finally:
            await kept._stack.aclose()

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._directory.addresses

    @property
    def port(self) -> int:
        return int(self.addresses[0].split("/")[4])

    @property
    def pid(self) -> int:
        return self._directory.pid

    @property
    def refused(self) -> Mapping[str, int]:
        return self._directory.refused

    async def advertise(self, record: bytes, ttl_s: float) -> None:
        """See `Directory.advertise`; ChildError while there is no child."""
        await self._directory.advertise(record, ttl_s)

    async def records(self, first: Iterable[str] = ()) -> dict[str, bytes]:
        """See `Directory.records`; ChildError while there is no child."""
        found = await self._directory.records(first)
        self._neighbours = self._directory.neighbours or self._neighbours
        return found

    async def _open(self, port: int, neighbours: Sequence[str] = ()) -> None:
        stack = AsyncExitStack()
        opened = self._open_directory(port, neighbours)
        self._directory = await stack.enter_async_context(opened)
        self._stack = stack

    async def _open_again(self, port: int) -> None:
        try:
            await self._open(port, self._neighbours)
        except PeerLostError:
            if not self._neighbours:
                raise
            await self._open(port)  # a first node goes on alone

    async def _keep(self) -> None:
        while True:
            try:
                await self._directory.wait()
            except ChildError as error:
                self._log("directory ended; starting it again", reason=str(error))
            port = self.port
            await self._stack.aclose()
            pause_s = 0.5
            while True:
                try:
                    await self._open_again(port)
                    break
                except SwarmError as error:
                    self._log("directory does not start", reason=str(error), again_in_s=pause_s)
                    await asyncio.sleep(pause_s)
                    pause_s = min(MAX_PAUSE_S, 2 * pause_s)
