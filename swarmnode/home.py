"""A node's home: one daemon at a time, and small files that only their owner may read."""

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from swarmnode.errors import BusyError, UserError

KEPT_S = 7 * 86400.0
"""How long the files of a job stay that nobody asks for."""


@contextlib.contextmanager
def locked(home: Path) -> Iterator[None]:
    """Make the home and hold it alone. Raises: BusyError if another daemon does."""
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (home / "lock").open("w")
    except OSError as error:
        raise UserError(f"home {home} cannot be used: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BusyError(
                f"home {home} is in use by another daemon; stop it or give another --home"
            ) from None
        yield


def load_token(path: Path) -> str:
    """The token of the local API; a new one if there is none yet."""
    try:
        token = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        token = ""
    if len(token) < 32:
        token = secrets.token_urlsafe(32)
        write_private(path, token + "\n")
    return token


def write_private(path: Path, text: str) -> None:
    """Write a small file that only its owner may read; complete or not at all."""
    partial = path.with_suffix(".partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    partial.replace(path)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file so that it is there completely or as it was before, also after a power cut."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
