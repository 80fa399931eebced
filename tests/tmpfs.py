"""File systems too small for what is written on them."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def tmpfs(folder: Path, size: str, *, is_lazy: bool = False) -> Iterator[None]:
    """An empty file system of `size`, for example "4m", on a folder; skips where none may be.

    `is_lazy`: files on it may still be open when it goes.
    """
    argv = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(argv, check=False, capture_output=True)
    except OSError as error:
        pytest.skip(f"a tmpfs cannot be mounted here: {error}")
    if mounted.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", *(["--lazy"] if is_lazy else []), str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Leave no page free; the file that took them all."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
    assert os.statvfs(disk).f_bavail == 0
    return ballast
