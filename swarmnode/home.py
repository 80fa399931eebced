"""A node's home: one daemon at a time, and small files that only their owner may read."""

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from swarmnode.errors import BusyError, UserError
from swarmnode.failpoints import hit

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
    """Write a file so that it is there completely or as it was before, also after a power cut.

    Several threads may write the same one: the last holds. Raises: OSError.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        hit("before_rename")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def remove_partials(folder: Path, name: str = "") -> None:
    """Delete what a crash has left half-written of the file `name`, or of all, in a folder.

    Call it while nobody writes there.
    """
    for path in (*folder.glob(f"{name}*.partial"), *folder.glob(f".{name}*.partial")):
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder, and what lacks above it, where it is not there yet; what is made is still
    there after a power cut. Raises: OSError."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Wait until a folder's list of names is on the disk. Raises: OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
