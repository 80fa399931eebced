"""The real `StateKeeper` on a simulated disk, and the blobs that a daemon serves from it."""

from collections.abc import Iterable
from pathlib import Path
from typing import cast

from swarmnode.domain import BlobRef
from swarmnode.errors import DataError
from swarmnode.p2p.blob_store import BlobStore, Range
from swarmnode.simulation.blobs import ref_of
from swarmnode.simulation.child import read_state, sim_log
from swarmnode.simulation.disk import Disk
from swarmnode.simulation.paths import SimPath
from swarmnode.worker.files import stage_directory
from swarmnode.worker.state_keeper import TENANCY_NAME, StateKeeper
from swarmnode.worker.training.log import UpdateLog


class SimStore:
    """Content by its hash: own blobs, and pieces of files that belong to somebody else."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._ranges: dict[str, tuple[str, int, int]] = {}

    def add_ranges(self, ranges: Iterable[Range]) -> None:
        for ref, path, offset in ranges:
            self._ranges[ref.sha256] = (str(path), offset, ref.num_bytes)

    def drop_ranges(self, path: object) -> None:
        gone = [name for name, (of, _, _) in self._ranges.items() if of == str(path)]
        for name in gone:
            del self._ranges[name]

    def put(self, data: bytes) -> BlobRef:
        """Raises: OSError."""
        ref = ref_of(data)
        self._disk.replace(f"store/{ref.sha256}", data)
        return ref

    def find(self, ref: BlobRef) -> bytes | None:
        """The content, perhaps damaged; None if it is not here."""
        own = f"store/{ref.sha256}"
        if own in self._disk:
            return self._disk.read(own)
        path, offset, num_bytes = self._ranges.get(ref.sha256, ("", 0, 0))
        if path not in self._disk:
            return None
        return self._disk.read(path)[offset : offset + num_bytes]


class SimKeeper(StateKeeper):
    """As on a real disk, but for what reads tensors or empties folders."""

    def __init__(self, disk: Disk, directory: str, store: SimStore) -> None:
        folder = cast(Path, SimPath(disk, directory))
        super().__init__(folder, cast(BlobStore, store), starts_itself=True)
        self._disk = disk

    def load(self) -> None:
        for stage in self._stages_on_disk():
            for path in self._files(stage).values():
                try:
                    read_state(path.read_bytes())
                except DataError:
                    path.unlink()
            self._load_log(stage)

    def log(self, stage: int) -> UpdateLog:
        return sim_log(self._disk, str(stage_directory(self.directory, stage)))

    def publish(self, path: Path, step: int) -> BlobRef:  # noqa: ARG002 - as it is overridden
        """Serve a state file as one blob."""
        data = path.read_bytes()
        ref = ref_of(data)
        self._store.add_ranges([Range(ref, path, 0)])
        return ref

    def remove(self) -> None:
        for stage in self._stages_on_disk():
            self._drop_stage(stage)
        for path in self._disk.paths(f"{self.directory}/"):
            if not path.endswith(TENANCY_NAME):
                self._disk.remove(path)

    def _drop_stage(self, stage: int) -> None:
        for path in self._files(stage).values():
            self._delete(path)
        self._delete_log(stage, tuple(self._logs.get(stage, {})))
        self._logs.pop(stage, None)
        self.memory.pop(stage, None)
        self._disk.remove_all(f"{stage_directory(self.directory, stage)}/")
