"""A full disk: what could not be written is tried again once there is room, which comes by itself
where somebody deletes a file."""

import asyncio
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path

from swarmnode.errors import SwarmError
from swarmnode.home import remove_partials, write_durably

ROOM_S = 10.0
"""Between two looks whether there is room again."""
ROOM_BYTES = 1 << 20
"""So much must be there before anything goes on: else it would stop again at once."""


def full_disk(error: BaseException) -> OSError | None:
    """What in `error`, or in what it came from, says that a disk or a quota is used up."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return error
    inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    causes = (*inner, *([error.__cause__] if error.__cause__ is not None else []))
    return next((found for cause in causes if (found := full_disk(cause)) is not None), None)


async def when_there_is_room(
    directory: Path,
    failure: OSError,
    again: Callable[[], Awaitable[None]],
    say: Callable[[str], Awaitable[None]],
) -> None:
    """Call `again` as soon as the disk of `directory` is not full any more, until it succeeds.

    `say` hears the reason now, and whenever it changes. Raises: what `again` raises that has
    nothing to do with a full disk.
    """
    said = ""
    while True:
        if str(failure) != said:
            said = str(failure)
            await say(said)
        await asyncio.sleep(ROOM_S)
        try:
            await asyncio.to_thread(_claim, directory)
            await again()
        except (SwarmError, OSError) as error:
            still = full_disk(error)
            if still is None:
                raise
            failure = still
        else:
            return


def _claim(directory: Path) -> None:
    """Raises: OSError if `ROOM_BYTES` cannot be written there."""
    path = directory / "room"
    try:
        write_durably(path, bytes(ROOM_BYTES))
    finally:
        path.unlink(missing_ok=True)
        remove_partials(directory, path.name)
