"""Which chunks of checkpoints stay on a node's disk: those of the newest ones of each job."""

import asyncio
import contextlib
from collections.abc import Callable, Container, Iterator, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING

from swarmnode.coordinator.checkpoints import CheckpointDesk
from swarmnode.coordinator.events import CheckpointRecord
from swarmnode.coordinator.journal import NUM_KEPT_CHECKPOINTS, read_journal
from swarmnode.coordinator.standby import JOURNAL_FILE, StandbyJournals
from swarmnode.domain import BlobRef, JobId
from swarmnode.errors import SwarmError
from swarmnode.manifest import Manifest
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.blobs import BlobClient, Provider
from swarmnode.p2p.states import TensorIndex
from swarmnode.tokens import TokenIndex

if TYPE_CHECKING:
    from swarmnode.coordinator.service import RunningJob


def chunks_of(store: BlobStore, records: Sequence[CheckpointRecord]) -> set[BlobRef]:
    """Every blob of checkpoints that is still here, their indexes included."""
    refs = {ref for record in records for ref in record.indexes}
    found = set(refs)
    for ref in refs:
        with contextlib.suppress(SwarmError):  # damaged: nobody can use its chunks
            if store.has(ref):
                found |= set(TensorIndex.from_json(store.read(ref)).chunks())
    return found


async def keep_state(
    job: JobId,
    index_ref: BlobRef,
    providers: Sequence[Provider],
    blobs: BlobClient,
    store: BlobStore,
) -> None:
    """Have a published state here for good, also what so far is a piece of our own worker's files.

    Raises: SwarmError; then nothing stays that was fetched for it.
    """
    refs = [index_ref]
    try:
        await blobs.fetch_all(job, refs, providers, is_borrowed=True)
        chunks = TensorIndex.from_json(store.read(index_ref)).chunks()
        refs += chunks
        await blobs.fetch_all(job, chunks, providers, is_borrowed=True)
        await asyncio.to_thread(store.own, refs)
    finally:
        await asyncio.to_thread(store.give_back, refs)


def forget_replaced(
    store: BlobStore,
    jobs: Sequence[Sequence[CheckpointRecord]],
    also_kept: Set[BlobRef],
    ended: Sequence[CheckpointRecord] = (),
) -> None:
    """Delete what only replaced checkpoints have, and those of a job that has `ended`.

    jobs: of each of the others its checkpoints, oldest first. Raises: OSError.
    """
    kept = set(also_kept).union(*(chunks_of(store, job[-NUM_KEPT_CHECKPOINTS:]) for job in jobs))
    for replaced in (*(job[:-NUM_KEPT_CHECKPOINTS] for job in jobs), ended):
        for ref in chunks_of(store, replaced) - kept:
            store.remove(ref)


class Retention:
    """Deletes chunks of checkpoints that no job keeps any more. May be used in any thread."""

    def __init__(
        self,
        store: BlobStore,
        directory: Path,
        jobs: Callable[[], Sequence["RunningJob"]],
        desk: CheckpointDesk,
        standby: StandbyJournals,
        log: Callable[..., None],
    ) -> None:
        """`jobs` are coordinated here; `directory` has a folder for each of them, and of others
        that earlier lives coordinated."""
        self._store = store
        self._directory = directory
        self._jobs = jobs
        self._desk = desk
        self._standby = standby
        self._log = log
        self._left: dict[JobId, tuple[int, list[CheckpointRecord]]] = {}
        """By job: when its journal of an earlier life was written, and what it tells."""

    def forget(self, ended: JobId | None = None) -> bool:
        """Delete the chunks of checkpoints that newer ones replaced; each job keeps the last two of
        which this node was told, also where it did not fetch them: others did.

        Two, because a worker may be fetching the older one while the newer is written. Jobs may
        share chunks, so those that are coordinated here and those of others are looked at together.
        Of a job of others that has `ended` none is kept. What goes wrong is logged, and False
        returned: chunks that stay too long cost nothing but room.
        """
        try:
            self._forget(ended)
        except Exception as error:
            self._log("old chunks stay", reason=str(error))
            return False
        return True

    def _forget(self, ended: JobId | None) -> None:
        self._desk.forget_replaced()
        jobs = self._jobs()
        kept = {ref for job in jobs for ref in content_of(self._store, job.manifest)}
        standby = self._standby.checkpoints()
        gone = standby.pop(ended, []) if ended is not None else []
        own = {job.manifest.job: job for job in jobs}
        told = [self._as_told(standby.pop(job, []), led) for job, led in own.items()]
        told += [_in_order(self._former(job), records) for job, records in standby.items()]
        told += self._left_behind({*own, *standby})
        forget_replaced(self._store, told, kept, gone)
        self._desk.update_soon()

    def _as_told(
        self, standby: list[CheckpointRecord], led: "RunningJob"
    ) -> list[CheckpointRecord]:
        """Of a job that this node coordinates, or did: its own journal and that of who does now."""
        own = led.runner.checkpoints
        return _in_order(own, standby) if led.ledger.is_over else _in_order(standby, own)

    def _former(self, job: JobId) -> list[CheckpointRecord]:
        """Of a job that an earlier life coordinated: the journal that it left. Raises: OSError."""
        path = self._directory / job / JOURNAL_FILE
        if not path.exists():
            return []
        written = path.stat().st_mtime_ns
        if self._left.get(job, (0, []))[0] != written:
            records = read_journal(path)[0]
            found = [record for record in records if isinstance(record, CheckpointRecord)]
            self._left[job] = (written, found)
        return self._left[job][1]

    def _left_behind(self, known: Container[JobId]) -> Iterator[list[CheckpointRecord]]:
        """The newest checkpoints of jobs that earlier lives coordinated here, and of which this one
        knows no more, or not yet. Raises: OSError."""
        for path in self._directory.glob(f"*/{JOURNAL_FILE}"):
            job = JobId(path.parent.name)
            if job not in known:
                yield self._former(job)[-NUM_KEPT_CHECKPOINTS:]


def _in_order(
    before: list[CheckpointRecord], after: list[CheckpointRecord]
) -> list[CheckpointRecord]:
    """Two tales of the same job as one, of which `after` knows better."""
    known = set(after)
    return [*(record for record in before if record not in known), *after]


def content_of(store: BlobStore, manifest: Manifest) -> set[BlobRef]:
    """Every blob that a job's manifest names, also through an index that is here."""
    found = {manifest.tokenizer}
    origin = manifest.model.weights
    if origin is not None:  # another job's checkpoint, perhaps, served from a folder
        found |= chunks_of(store, [CheckpointRecord(0, (origin,))])
    if manifest.data is not None:
        for ref in (manifest.data.train, manifest.data.validation):
            found.add(ref)
            with contextlib.suppress(SwarmError):
                found |= set(TokenIndex.parse(store.read(ref)).chunks)
    return found
