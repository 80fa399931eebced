"""Where the time of a node goes: spans as JSON lines in files, on nodes that are to keep them.

Times are of the machine's monotonic clock, in seconds, so the files of one machine compare.
"""

import contextlib
import json
from pathlib import Path
from typing import Protocol

TRACE_DIRECTORY = "trace"
"""In the home of a node: one file for the daemon, one for each worker child."""

Fact = str | int | float | bool | tuple[int, ...]


class OnSpan(Protocol):
    """Takes what was done, from when to when, and what it was about."""

    def __call__(self, what: str, began_s: float, ended_s: float, /, **facts: Fact) -> None: ...


def ignore_span(what: str, began_s: float, ended_s: float, /, **facts: Fact) -> None:
    """Keep nothing: what it costs to be asked is a call."""


class TraceFile:
    """Writes each span at once; a killed process loses none but the one being written."""

    def __init__(self, path: Path) -> None:
        """Raises: OSError if the file cannot be made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1, encoding="ascii")

    def span(self, what: str, began_s: float, ended_s: float, /, **facts: Fact) -> None:
        """Write one line, or go without it where the disk takes none. See `OnSpan`."""
        line = {"what": what, "began_s": round(began_s, 6), "ended_s": round(ended_s, 6), **facts}
        with contextlib.suppress(OSError):
            self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self._file.close()
