"""A typed conversation on one stream: messages both ways, a heartbeat, and silence as death."""

import asyncio
from collections.abc import Awaitable, Callable

from swarmnode.domain import JobId
from swarmnode.errors import PeerLostError, ProtocolError, SwarmError
from swarmnode.failpoints import hit
from swarmnode.heartbeats import Ping
from swarmnode.messages import (
    Commit,
    Message,
)
from swarmnode.p2p.ports import EndOfStream, Stream
from swarmnode.wire import pack, unpack

HEARTBEAT_S = 1.0
DEAD_AFTER_S = 5.0
SEND_TIMEOUT_S = 30.0
"""A peer that takes nothing off the wire for this long is lost."""

OnMessage = Callable[[Message, memoryview], Awaitable[None]]
OnSent = Callable[[int], None]


class Conversation:
    """Messages with one peer about one job; `run` returns when it is over."""

    def __init__(
        self,
        stream: Stream,
        job: JobId,
        on_message: OnMessage,
        on_sent: OnSent = lambda _: None,
        *,
        max_queued: int = 4096,
    ) -> None:
        self._stream = stream
        self._job = job
        self._on_message = on_message
        self._on_sent = on_sent
        self._outbox: asyncio.Queue[tuple[Message, bytes]] = asyncio.Queue(max_queued)

    def post(self, message: Message, payload: bytes = b"") -> None:
        """Queue a message. Raises: PeerLostError if the peer has not kept up at all."""
        try:
            self._outbox.put_nowait((message, payload))
        except asyncio.QueueFull:
            raise PeerLostError(self._stream.peer, "its outbox is full") from None

    async def run(self) -> None:
        """Talk until the peer closes its side.

        Raises: PeerLostError when the stream breaks or the peer is silent for DEAD_AFTER_S,
        ProtocolError when it sends nonsense, and whatever `on_message` raises.
        """
        try:
            async with asyncio.TaskGroup() as group:
                writer = group.create_task(self._write(), name="conversation writer")
                pinger = group.create_task(self._ping(), name="conversation heartbeat")
                await self._read()
                writer.cancel()
                pinger.cancel()
        except BaseExceptionGroup as failures:
            raise first_error(failures) from None
        finally:
            await self._stream.reset()

    async def _read(self) -> None:
        while True:
            try:
                async with asyncio.timeout(DEAD_AFTER_S):
                    data = await self._stream.receive()
            except TimeoutError:
                reason = f"silent for {DEAD_AFTER_S:.0f} s"
                raise PeerLostError(self._stream.peer, reason) from None
            except EndOfStream:
                return
            message, payload = unpack(data)
            if getattr(message, "job", None) != self._job:
                raise ProtocolError(f"{type(message).__name__} of another job")
            if not isinstance(message, Ping):
                await self._on_message(message, payload)

    async def _write(self) -> None:
        while True:
            message, payload = await self._outbox.get()
            header = pack(message)
            try:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await self._stream.send(header, payload)
            except TimeoutError:
                raise PeerLostError(self._stream.peer, "takes nothing off the wire") from None
            if isinstance(message, Commit):
                hit("commit_sent", message.step)
            self._on_sent(len(header) + len(payload))

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            if self._outbox.empty():
                self.post(Ping(self._job))


def first_error(failures: BaseExceptionGroup) -> BaseException:
    """The error that ended a task group: one of ours if there is one."""
    leaves: list[BaseException] = []
    pending: list[BaseException] = [failures]
    while pending:
        error = pending.pop(0)
        if isinstance(error, BaseExceptionGroup):
            pending.extend(error.exceptions)
        else:
            leaves.append(error)
    ours = [error for error in leaves if isinstance(error, SwarmError)]
    return (ours or leaves)[0]
