"""Work in threads: whoever is cancelled ends when the thread has, so nothing is written behind."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeVar, TypeVarTuple

Result = TypeVar("Result")
Args = TypeVarTuple("Args")


async def in_thread(
    work: Callable[[*Args], Result], *args: *Args, on_cancel: Callable[[], None] = lambda: None
) -> Result:
    """What `work` returns, or raises, in a thread.

    Whoever is cancelled meanwhile, however often, waits for the thread all the same: what follows,
    such as the end of a lock, finds it ended. `on_cancel` may tell the thread to hurry.
    """
    working = asyncio.get_running_loop().run_in_executor(None, partial(work, *args))
    cancelled: asyncio.CancelledError | None = None
    while not working.done():
        try:
            await asyncio.wait([working])  # a cancelled wait does not cancel what it is for
        except asyncio.CancelledError as error:
            on_cancel()
            cancelled = error
    if cancelled is not None:
        working.exception()  # is of no interest
        raise cancelled
    return working.result()
