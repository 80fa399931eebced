"""Signed manifests over a node's checkpoints: written, collected, audited, exported.

A checkpoint counts as soon as the journal names it; its manifest follows in a thread of its own,
so that hashing a large model never holds up a job.
"""

import asyncio
import contextlib
import json
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from swarmnode.coordinator.events import CheckpointRecord
from swarmnode.coordinator.journal import NUM_KEPT_CHECKPOINTS
from swarmnode.coordinator.submission import TOKENIZER_FILES
from swarmnode.domain import BlobRef
from swarmnode.errors import DataError, NotFoundError, SwarmError
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.checkpoint_files import (
    SHELF_FOLDER,
    Audit,
    OnBytes,
    Shelf,
    audit_shelf,
    write_folder,
)
from swarmnode.p2p.checkpoints import (
    Checkpoint,
    CheckpointManifest,
    DataCursor,
    OptimizerState,
    RandomState,
    finite,
    hash_weights,
    merge,
)
from swarmnode.p2p.identity import Identity
from swarmnode.p2p.states import TensorIndex

if TYPE_CHECKING:
    from swarmnode.coordinator.service import RunningJob

_SOFTWARE = ("swarmnode", "torch", "safetensors")


class CheckpointDesk:
    """The checkpoints of every job that a node coordinates."""

    def __init__(
        self,
        identity: Identity,
        store: BlobStore,
        jobs: Callable[[], Iterable["RunningJob"]],
        log: Callable[..., None],
    ) -> None:
        self._identity = identity
        self._store = store
        self._jobs = jobs
        self._log = log
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._is_over = threading.Event()

    async def run(self) -> None:
        """Catch up with the journals; when cancelled, let no thread hold up the node's end."""
        self.update_soon()
        try:
            await asyncio.Event().wait()
        finally:
            self._is_over.set()
            self._writer.shutdown(wait=False, cancel_futures=True)

    def update_soon(self) -> None:
        """Write the manifests that are missing, aside. May be called from any thread."""
        with contextlib.suppress(RuntimeError):  # the node stops
            self._writer.submit(self._update)

    def forget_replaced(self) -> None:
        """Drop the manifests of checkpoints whose chunks are about to go."""
        for job in self._jobs():
            shelf_of(job).keep_only(record.step for record in _kept(job))

    async def listed(self, job: "RunningJob") -> tuple[Checkpoint, ...]:
        """The manifests of a job, the oldest first. Raises: DataError if one is damaged."""
        shelf = await self._whole_shelf(job)
        return tuple([await asyncio.to_thread(shelf.load, step) for step in shelf.steps()])

    async def num_bytes(self, job: "RunningJob") -> int:
        """How much an audit reads."""
        shelf, total = await self._whole_shelf(job), 0
        for step in shelf.steps():
            with contextlib.suppress(DataError):  # damaged: the audit says so
                total += (await asyncio.to_thread(shelf.load, step)).manifest.num_bytes
        return total

    async def audited(self, job: "RunningJob", on_bytes: OnBytes) -> tuple[Audit, ...]:
        """What is wrong with each checkpoint of a job."""
        shelf = await self._whole_shelf(job)
        return await asyncio.to_thread(audit_shelf, shelf, self._store.root, on_bytes)

    async def exported(
        self, job: "RunningJob", checkpoint: Checkpoint, directory: Path, on_bytes: OnBytes
    ) -> None:
        """Write a folder that the job, or another one, can be resumed from.

        Raises: BusyError, ChunkError, SwarmError; nothing is under the folder's name then.
        """
        texts = tokenizer_files(job.tokenizer_directory)
        await asyncio.to_thread(write_folder, directory, checkpoint, self._read, texts, on_bytes)

    async def find(self, job: "RunningJob", step: int | None) -> Checkpoint:
        """The checkpoint after `step` steps, the newest if None. Raises: NotFoundError."""
        shelf = await self._whole_shelf(job)
        steps = shelf.steps()
        if not steps:
            raise NotFoundError(f"job {job.manifest.job} has no checkpoint yet")
        return await asyncio.to_thread(shelf.load, steps[-1] if step is None else step)

    async def _whole_shelf(self, job: "RunningJob") -> Shelf:
        """The shelf once everything is on it that the job's state names."""
        await job.runner.settled()
        try:
            await asyncio.wrap_future(self._writer.submit(self._update))
        except RuntimeError:
            raise SwarmError("the node stops") from None
        return shelf_of(job)

    def _read(self, ref: BlobRef) -> bytes:
        if self._is_over.is_set():
            raise SwarmError("the node stops")
        return self._store.read(ref)

    def _update(self) -> None:
        for job in self._jobs():
            shelf, kept = shelf_of(job), _kept(job)
            for record in kept:
                if record.step not in shelf.steps():
                    self._add(job, shelf, record)
            shelf.keep_only(record.step for record in kept)

    def _add(self, job: "RunningJob", shelf: Shelf, record: CheckpointRecord) -> None:
        try:
            shelf.add(self._describe(job, record, _parent(job, shelf, record.step)))
        except (SwarmError, OSError, ValueError) as error:  # tried again with the next one
            name = job.manifest.job
            self._log("no manifest of a checkpoint", job=name, step=record.step, reason=str(error))

    def _describe(
        self, job: "RunningJob", record: CheckpointRecord, parent: str | None
    ) -> Checkpoint:
        read, step, manifest = self._read, record.step, job.manifest
        indexes = [TensorIndex.from_json(read(ref)) for ref in record.indexes]
        atoms = merge(indexes, tied=job.facts.tied)
        losses = job.ledger.progress.losses
        number = step - manifest.start_step - 1
        body = CheckpointManifest(
            job=manifest.job,
            job_manifest=json.loads(manifest.canonical()),
            step=step,
            generation=job.ledger.generation,
            parent=parent,
            data=DataCursor(next_step=step),
            random=RandomState(seed=manifest.run.seed),
            optimizer=OptimizerState(
                kind="adamw" if manifest.codecs.sync is None else "outer", step=step
            ),
            loss=finite(losses[number]) if 0 <= number < len(losses) else None,
            coarser_links=job.ledger.plan.links if job.ledger.plan else (),
            weights_sha256=hash_weights(atoms, read),
            software=dict(_software()),
            created_at_s=round(time.time(), 3),
            coordinator=self._identity.peer,
            atoms=atoms,
        )
        return Checkpoint.signed(body, self._identity)


def shelf_of(job: "RunningJob") -> Shelf:
    return Shelf(job.directory / SHELF_FOLDER)


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The files of a tokenizer's folder that travel with a model, by name."""
    return {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}


def _kept(job: "RunningJob") -> list[CheckpointRecord]:
    return job.runner.checkpoints[-NUM_KEPT_CHECKPOINTS:]


def _parent(job: "RunningJob", shelf: Shelf, step: int) -> str | None:
    """The hash of the manifest before: on the shelf, else the one that the job resumed from."""
    earlier = [each for each in shelf.steps() if each < step]
    with contextlib.suppress(DataError, NotFoundError):
        if earlier:
            return shelf.load(earlier[-1]).sha256
    return job.manifest.model.checkpoint


def _software() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for name in _SOFTWARE:
        with contextlib.suppress(PackageNotFoundError):
            yield name, version(name)
