"""Places where a test may kill the process: each is a name, and most have a step or a number.

SWARMNODE_FAILPOINT="name" or "name:step" arms one; SWARMNODE_FAILPOINT_ONCE names a file that is
made when it is hit, and that keeps it from being hit again. SWARMNODE_FAILPOINT="@file" arms what
the file says once it is there; it is removed when it is hit. Where files of several processes are
links to one, that one is removed: whoever comes first dies, and nobody else. Unarmed, a place costs
one comparison.
"""

import contextlib
import os
import signal
from pathlib import Path

_ARMED = os.environ.get("SWARMNODE_FAILPOINT", "")


def hit(name: str, step: int | None = None) -> None:
    """Kill this process at once, as a power cut would, if this place is armed."""
    if _ARMED and is_armed(name, step) and _is_first():
        os.kill(os.getpid(), signal.SIGKILL)


def is_armed(name: str, step: int | None = None) -> bool:
    """Whether the environment, or the file that it names, names this place, at any step or this."""
    armed = _ARMED
    if armed.startswith("@"):
        armed = ""
        with contextlib.suppress(OSError):
            armed = Path(_ARMED[1:]).read_text(encoding="utf-8").strip()
    wanted, _, at = armed.partition(":")
    return wanted == name and (not at or at == str(step))


def _is_first() -> bool:
    """Whether nobody was killed here before, where that may happen only once."""
    marker = os.environ.get("SWARMNODE_FAILPOINT_ONCE")
    try:
        if _ARMED.startswith("@"):
            Path(_ARMED[1:]).resolve(strict=True).unlink()
        elif marker is not None:
            Path(marker).touch(exist_ok=False)
    except (FileExistsError, FileNotFoundError):
        return False
    return True
