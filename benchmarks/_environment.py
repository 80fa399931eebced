"""What a benchmark line must say besides its numbers."""

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path


def environment(packages: Sequence[str] = ()) -> dict[str, object]:
    """Return the versions of Python and `packages`, the machine, and the commit being measured."""
    return {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_1min": round(os.getloadavg()[0], 2),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "is_modified": bool(_git("status", "--porcelain", "--", "swarmnode")),
    }


def _git(*args: str) -> str:
    """Return what git says about the tree, or nothing where there is no git."""
    try:
        result = subprocess.run(
            ["git", *args], cwd=Path(__file__).parent.parent, capture_output=True, text=True
        )
    except OSError:
        return ""
    return result.stdout.strip()
