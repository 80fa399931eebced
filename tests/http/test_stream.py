import asyncio
from collections.abc import AsyncGenerator, MutableMapping
from typing import Any

from starlette.applications import Starlette

from swarmnode.errors import CapacityError, PeerLostError
from swarmnode.http.failures import control_failure
from swarmnode.http.stream import EventStream, closing


class Generator:
    """Two events, the second when it is allowed; tells when it was closed."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.is_closed = False

    async def events(self) -> AsyncGenerator[bytes, None]:
        try:
            yield b"one"
            await self.go_on.wait()
            yield b"two"
        finally:
            self.is_closed = True


class Client:
    """The two ends of a connection, without a network."""

    def __init__(self) -> None:
        app = Starlette()
        app.state.closing = asyncio.Event()
        self.scope: dict[str, Any] = {"type": "http", "app": app}
        self.got: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue()
        self.gone = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        self.got.put_nowait(message)

    async def body(self) -> bytes:
        async with asyncio.timeout(5):
            message = await self.got.get()
        return bytes(message.get("body", b"start"))


async def test_leaving_the_block_closes_a_generator_that_is_still_held() -> None:
    generator = Generator()
    events = generator.events()
    async with closing(events) as held:
        assert await anext(held) == b"one"
        assert not generator.is_closed
    assert generator.is_closed


async def test_silence_is_filled_with_comments_until_the_next_event() -> None:
    generator, client = Generator(), Client()
    stream = EventStream(generator.events(), control_failure, quiet_s=0.02)
    async with asyncio.TaskGroup() as group:
        group.create_task(stream(client.scope, client.receive, client.send))
        assert [await client.body() for _ in range(2)] == [b"start", b"data: one\n\n"]
        assert await client.body() == b": keep-alive\n\n"
        generator.go_on.set()
        while (body := await client.body()) == b": keep-alive\n\n":
            pass
        assert body == b"data: two\n\n"
        assert await client.body() == b""
    assert generator.is_closed


async def test_a_closing_server_ends_a_stream_and_its_generator() -> None:
    generator, client = Generator(), Client()
    stream = EventStream(generator.events(), control_failure)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(stream(client.scope, client.receive, client.send))
        assert await client.body() == b"start"
        client.scope["app"].state.closing.set()
        async with asyncio.timeout(5):
            await task
    assert generator.is_closed


async def test_an_error_is_an_answer_before_the_first_event_and_an_event_after_it() -> None:
    async def fails(after: int) -> AsyncGenerator[bytes, None]:
        for _ in range(after):
            yield b"one"
        raise PeerLostError("p", "gone") if after else CapacityError("busy")

    client = Client()
    await EventStream(fails(0), control_failure)(client.scope, client.receive, client.send)
    assert (await client.got.get())["status"] == 503
    assert b'"CapacityError"' in await client.body()
    client = Client()
    await EventStream(fails(1), control_failure)(client.scope, client.receive, client.send)
    assert (await client.got.get())["status"] == 200
    assert await client.body() == b"data: one\n\n"
    assert (await client.body()).startswith(b'data: {"error":{"type":"PeerLostError"')
