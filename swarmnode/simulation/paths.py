"""Paths on a simulated disk: as much of `pathlib.Path` as the product's own files code uses."""

import io
from collections.abc import Iterator
from fnmatch import fnmatch
from types import TracebackType
from typing import NamedTuple, Self

from swarmnode.simulation.disk import Disk


class SimPath:
    """A file or folder of one machine. A file that is written is safe once it is renamed."""

    def __init__(self, disk: Disk, path: str) -> None:
        self._disk = disk
        self._path = path

    def __truediv__(self, name: str) -> "SimPath":
        return SimPath(self._disk, f"{self._path}/{name}")

    def __str__(self) -> str:
        return self._path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SimPath) and other._path == self._path

    def __hash__(self) -> int:
        return hash(self._path)

    def __lt__(self, other: "SimPath") -> bool:
        return self._path < other._path

    @property
    def name(self) -> str:
        return self._path.rpartition("/")[2]

    @property
    def parent(self) -> "SimPath":
        return SimPath(self._disk, self._path.rpartition("/")[0])

    @property
    def suffix(self) -> str:
        stem, dot, rest = self.name.rpartition(".")
        return dot + rest if stem else ""

    @property
    def stem(self) -> str:
        return self.name.removesuffix(self.suffix)

    def with_name(self, name: str) -> "SimPath":
        return self.parent / name

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Folders are where files are."""

    def is_dir(self) -> bool:
        return bool(self._disk.paths(self._path + "/"))

    def exists(self) -> bool:
        return self._path in self._disk or self.is_dir()

    def iterdir(self) -> Iterator["SimPath"]:
        prefix = self._path + "/"
        names = {path[len(prefix) :].partition("/")[0] for path in self._disk.paths(prefix)}
        return (self / name for name in sorted(names))

    def glob(self, pattern: str) -> Iterator["SimPath"]:
        return (path for path in self.iterdir() if fnmatch(path.name, pattern))

    def open(self, mode: str) -> "SimFile":
        if mode == "rb":
            return SimFile(self._disk.read(self._path), None, "")
        assert mode == "wb", mode
        return SimFile(b"", self._disk, self._path)

    def stat(self) -> "SimStat":
        return SimStat(len(self.read_bytes()))

    def read_bytes(self) -> bytes:
        return self._disk.read(self._path)

    def unlink(self, *, missing_ok: bool = False) -> None:
        if self._path not in self._disk and not missing_ok:
            raise FileNotFoundError(self._path)
        self._disk.remove(self._path)

    def replace(self, target: "SimPath") -> None:
        data = self._disk.read(self._path)
        self._disk.remove(self._path)
        self._disk.replace(str(target), data)


class SimStat(NamedTuple):
    """What is known of a file."""

    st_size: int


class SimFile(io.BytesIO):
    """An open file; what is written arrives when it is closed."""

    def __init__(self, data: bytes, disk: Disk | None, path: str) -> None:
        super().__init__(data)
        self._disk = disk
        self._path = path

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._disk is not None and kind is None:
            self._disk.remove(self._path)
            self._disk.append(self._path, self.getvalue())
        self.close()
