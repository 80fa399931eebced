"""Once a day: what nobody asks for any more goes from the disk of a daemon that runs for weeks."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

SWEEP_S = 86400.0

Sweep = Callable[[float], Awaitable[None]]
"""Deletes what is old at this time on the wall clock."""


async def sweep_daily(
    sweeps: Sequence[Sweep],
    log: Callable[..., None],
    now_s: Callable[[], float] = time.time,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Do all of `sweeps` now, and every SWEEP_S; what goes wrong with one is logged."""
    while True:
        for sweep in sweeps:
            try:
                await sweep(now_s())
            except Exception as error:
                log("not swept", reason=str(error))
        await sleep(SWEEP_S)
