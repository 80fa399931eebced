"""A machine's disk: what was written, what is safe after an fsync, and what a crash makes of it.

A process that dies leaves everything that it wrote; a machine that loses its power keeps only what
was synchronised, and of the rest a random beginning.
"""

import errno
import os
from dataclasses import dataclass
from random import Random


@dataclass
class _File:
    data: bytes
    """As programs read it."""
    safe: bytes | None
    """As it is after a loss of power; None: the file does not exist then."""


class Disk:
    """The files of one machine, by path. Raises OSError (ENOSPC) while it is full."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}
        self.is_full = False
        self.is_damaged = False
        """Whether something that was safe on it is not any more."""
        self.sync_s = 0.001
        """How long an fsync takes now."""

    def __contains__(self, path: str) -> bool:
        return path in self._files

    def paths(self, prefix: str = "") -> list[str]:
        return sorted(path for path in self._files if path.startswith(prefix))

    def read(self, path: str) -> bytes:
        """Raises: FileNotFoundError."""
        if path not in self._files:
            raise FileNotFoundError(path)
        return self._files[path].data

    def append(self, path: str, data: bytes) -> None:
        """Write behind the end; safe after `sync`."""
        self._check_room()
        file = self._files.setdefault(path, _File(b"", None))
        file.data += data

    def truncate(self, path: str, num_bytes: int) -> None:
        file = self._files.get(path)
        if file is not None:
            file.data = file.data[:num_bytes]

    def sync(self, path: str) -> None:
        """What is in the file is safe. Raises: OSError, while the disk is full."""
        self._check_room()
        file = self._files.get(path)
        if file is not None:
            file.safe = file.data

    def settle(self, path: str) -> None:
        """What an earlier process left in the file is safe; there was room for it."""
        file = self._files[path]
        file.safe = file.data

    def replace(self, path: str, data: bytes) -> None:
        """Write a file through a synchronised partial one: always whole, old or new."""
        self._check_room()
        self._files[path] = _File(data, data)

    def remove(self, path: str) -> None:
        self._files.pop(path, None)

    def remove_all(self, prefix: str) -> None:
        for path in self.paths(prefix):
            del self._files[path]

    def wipe(self) -> None:
        """Another disk: everything is gone."""
        self._files.clear()
        self.is_full = False
        self.is_damaged = True

    def lose_power(self, chance: Random) -> None:
        """Forget what was not safe; of an appended tail a random part may have arrived."""
        for path, file in list(self._files.items()):
            safe = file.safe
            if safe is None:
                if chance.random() < 0.5:
                    del self._files[path]
                    continue
                safe = b""
            if file.data.startswith(safe):
                length = len(safe) + chance.randint(0, len(file.data) - len(safe))
                safe = file.data[:length]
            file.data = file.safe = safe

    def rot(self, path: str, chance: Random) -> None:
        """Flip one bit of a file."""
        file = self._files[path]
        self.is_damaged = True
        if file.data:
            at = chance.randrange(len(file.data))
            flipped = bytes([file.data[at] ^ 1 << chance.randrange(8)])
            file.data = file.safe = file.data[:at] + flipped + file.data[at + 1 :]

    def _check_room(self) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
