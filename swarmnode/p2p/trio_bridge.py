"""A trio run in a thread of its own, called from asyncio.

A thread and not guest mode: as fast, and neither loop can starve the other.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Generic, TypeVar

import trio

Resource = TypeVar("Resource")
Result = TypeVar("Result")

_STOP_TIMEOUT_S = 5.0


class TrioBridge(Generic[Resource]):
    """Runs coroutines of the trio side for the asyncio side.

    `resource` is what the context manager of `start` gave; it lives and dies on the trio side.
    """

    def __init__(self) -> None:
        self.resource: Resource
        self._loop = asyncio.get_running_loop()
        self._token: trio.lowlevel.TrioToken
        self._nursery: trio.Nursery
        self._stop = trio.CancelScope()
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._finished: asyncio.Future[BaseException | None] = self._loop.create_future()
        self._pending: set[asyncio.Future[Any]] = set()

    @classmethod
    @asynccontextmanager
    async def start(
        cls, name: str, context: Callable[[], AbstractAsyncContextManager[Resource]]
    ) -> AsyncIterator["TrioBridge[Resource]"]:
        """Enter `context` in a new trio thread; leave it and end the thread on the way out.

        Raises: whatever entering `context` raises.
        """
        bridge = cls()
        thread = threading.Thread(target=bridge._main, args=(context,), name=name, daemon=True)
        thread.start()
        try:
            await bridge._started
            yield bridge
        finally:
            await bridge._end()
            thread.join(_STOP_TIMEOUT_S)

    async def call(
        self,
        function: Callable[..., Awaitable[Result]],
        *args: Any,
        name: str | None = None,
        dispose: Callable[[Result], Awaitable[object]] | None = None,
    ) -> Result:
        """Await `function(*args)` on the trio side; cancelling this cancels it there.

        After a cancellation this returns only when the trio side has let go of the arguments. It
        may have been done by then: such a result goes to `dispose`, on the trio side, which must
        not raise.
        Raises: what `function` raises, or trio.RunFinishedError if the trio side is gone.
        """
        scope = trio.CancelScope()
        future: asyncio.Future[Result] = self._loop.create_future()
        self._pending.add(future)
        try:
            self._token.run_sync_soon(self._spawn, scope, future, function, args, name)
            await asyncio.wait((future,))
        except asyncio.CancelledError:
            self.post(scope.cancel)
            while not future.done():
                with suppress(asyncio.CancelledError):  # raised again below
                    await asyncio.wait((future,))
            is_done = future.exception() is None  # retrieved, since nobody else will
            if is_done and dispose is not None:
                self.post_task(dispose, future.result())
            raise
        finally:
            self._pending.discard(future)
        return future.result()

    def post(self, function: Callable[..., object], *args: Any) -> None:
        """Run a plain function on the trio side soon, in order; nothing if it is gone."""
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(function, *args)

    def post_task(self, function: Callable[..., Awaitable[object]], *args: Any) -> None:
        """Start a task on the trio side soon; it must not raise."""
        self.post(self._start_soon, function, *args)

    def tell(self, function: Callable[..., object], *args: Any) -> None:
        """From the trio side: run a plain function on the asyncio side soon, in order."""
        with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(function, *args)

    def new_future(self) -> "asyncio.Future[None]":
        """Return a future of the asyncio side."""
        return self._loop.create_future()

    async def wait_crashed(self) -> None:
        """Wait until the trio side has ended by itself, then raise why."""
        error = await asyncio.shield(self._finished)
        raise trio.RunFinishedError("the trio thread has ended") from error

    def _main(self, context: Callable[[], AbstractAsyncContextManager[Resource]]) -> None:
        error: BaseException | None = None
        try:
            trio.run(self._run, context)
        except BaseException as caught:
            error = caught
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]  # the nurseries that it passed say nothing more
        self.tell(self._finish, error)

    async def _run(self, context: Callable[[], AbstractAsyncContextManager[Resource]]) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with self._stop:
            async with context() as self.resource, trio.open_nursery() as self._nursery:
                self.tell(_resolve, self._started, None)
                await trio.sleep_forever()

    async def _end(self) -> None:
        if hasattr(self, "_token"):
            self.post(self._stop.cancel)
        while not self._finished.done():
            await asyncio.wait((self._finished,))

    def _finish(self, error: BaseException | None) -> None:
        _resolve(self._finished, error)
        gone = trio.RunFinishedError("the trio thread has ended")
        gone.__cause__ = error
        for future in self._pending:
            _fail(future, gone)
        _fail(self._started, error or gone)

    def _start_soon(self, function: Callable[..., Awaitable[object]], *args: Any) -> None:
        with suppress(RuntimeError):  # the nursery is closed: the run is ending
            self._nursery.start_soon(function, *args)

    def _spawn(
        self,
        scope: trio.CancelScope,
        future: "asyncio.Future[Result]",
        function: Callable[..., Awaitable[Result]],
        args: tuple[Any, ...],
        name: str | None,
    ) -> None:
        async def run() -> None:
            try:
                with scope:
                    self.tell(_resolve, future, await function(*args))
                if scope.cancelled_caught:
                    self.tell(_fail, future, trio.RunFinishedError("cancelled"))
            except Exception as error:
                self.tell(_fail, future, error)

        with suppress(RuntimeError):  # the nursery is closed: _finish fails the future
            self._nursery.start_soon(run, name=name)


def _resolve(future: "asyncio.Future[Result]", result: Result) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: "asyncio.Future[Any]", error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
