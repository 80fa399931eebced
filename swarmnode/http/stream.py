"""Answers that take time: they end when the client goes away or the server closes."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from swarmnode.errors import SwarmError

ValueT = TypeVar("ValueT")
ItemT = TypeVar("ItemT")
SEND_S = 60.0
"""A client that reads nothing for this long loses its stream, so that it holds no session."""
QUIET_S = 10.0
"""After this long without an event a comment keeps the connection open."""


@contextlib.asynccontextmanager
async def closing(iterator: AsyncIterator[ItemT]) -> AsyncGenerator[AsyncIterator[ItemT], None]:
    """Close `iterator` on the way out: a generator's own cleanup runs at once, not some day."""
    try:
        yield iterator
    finally:
        aclose = getattr(iterator, "aclose", None)
        if aclose is not None:
            await aclose()


async def while_connected(
    scope: Scope, receive: Receive, work: Coroutine[Any, Any, ValueT]
) -> ValueT | None:
    """Run `work`; cancel it, and return None, if the client leaves or the server closes.

    The body of the request must have been read. Raises: SwarmError as `work` does.
    """

    async def outcome() -> ValueT | SwarmError:
        try:
            return await work
        except SwarmError as error:
            return error

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async with asyncio.TaskGroup() as group:
        task = group.create_task(outcome(), name="http-work")
        ends = [
            group.create_task(disconnected(), name="http-disconnected"),
            group.create_task(scope["app"].state.closing.wait(), name="http-closing"),
        ]
        await asyncio.wait([task, *ends], return_when=asyncio.FIRST_COMPLETED)
        for each in (task, *ends):
            each.cancel()
    result = None if task.cancelled() else task.result()
    if isinstance(result, SwarmError):
        raise result
    return result


class EventStream(Response):
    """Server-sent events. An error before the first is an ordinary answer, later an event.

    `events` yields the data of each event and is closed when the client leaves. `failed` gives
    the answer to an error.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        failed: Callable[[SwarmError], Response],
        *,
        quiet_s: float = QUIET_S,
    ) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._failed = failed
        self._quiet_s = quiet_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(scope, receive, self._run(scope, receive, send))

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        queue: asyncio.Queue[bytes | SwarmError | None] = asyncio.Queue(maxsize=16)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._produce(queue), name="http-events")
            first = await self._next(queue)
            if isinstance(first, SwarmError):
                await self._failed(first)(scope, receive, send)
                return
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            item: bytes | SwarmError | None = first
            while item is not None:
                data = bytes(self._failed(item).body) if isinstance(item, SwarmError) else item
                event = b"data: " + data + b"\n\n" if data else b": keep-alive\n\n"
                message = {"type": "http.response.body", "body": event, "more_body": True}
                async with asyncio.timeout(SEND_S):
                    await send(message)
                item = await self._next(queue)
            await send({"type": "http.response.body", "body": b""})

    async def _next(
        self, queue: "asyncio.Queue[bytes | SwarmError | None]"
    ) -> bytes | SwarmError | None:
        """The next event, an error, None at the end, or no bytes after a quiet time."""
        try:
            async with asyncio.timeout(self._quiet_s):
                return await queue.get()
        except TimeoutError:
            return b""

    async def _produce(self, queue: "asyncio.Queue[bytes | SwarmError | None]") -> None:
        try:
            async with closing(self._events) as events:
                async for event in events:
                    await queue.put(event)
        except SwarmError as error:
            await queue.put(error)
        await queue.put(None)
