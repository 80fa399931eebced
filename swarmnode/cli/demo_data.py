"""Real text that every machine with Python has: the standard library's own sources."""

import random
import sysconfig
from pathlib import Path

from swarmnode.errors import DataError

_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
)


def write_stdlib_sources(folder: Path, num_bytes: int, seed: int) -> int:
    """Copy about `num_bytes` of sources into `folder`, in an order drawn from `seed`.

    The order mixes the packages, so that what is held out (the tail) is like the rest. Returns
    the number of files. Raises: DataError if this Python has no sources.
    """
    library = Path(sysconfig.get_path("stdlib"))
    paths = sorted(
        path
        for path in library.rglob("*.py")
        if not _LEFT_OUT.intersection(path.relative_to(library).parts)
    )
    random.Random(seed).shuffle(paths)  # noqa: S311 - an order, not a secret
    folder.mkdir(parents=True)
    num_files = written_bytes = 0
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if not text.strip():
            continue
        (folder / f"{num_files:05}-{path.name}").write_text(text, encoding="utf-8")
        num_files += 1
        written_bytes += len(text.encode())
        if written_bytes >= num_bytes:
            break
    if not num_files:
        raise DataError(f"no Python sources in {library}; give text with --data PATH")
    return num_files
