"""Which chunks of checkpoints stay on a node's disk: those of the newest ones of each job."""

import asyncio
import contextlib
from collections.abc import Sequence, Set

from swarmnode.coordinator.events import CheckpointRecord
from swarmnode.coordinator.journal import NUM_KEPT_CHECKPOINTS
from swarmnode.domain import BlobRef, JobId
from swarmnode.errors import SwarmError
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.blobs import BlobClient, Provider
from swarmnode.p2p.states import TensorIndex


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
    store: BlobStore, jobs: Sequence[Sequence[CheckpointRecord]], also_kept: Set[BlobRef]
) -> None:
    """Delete what only replaced checkpoints have. jobs: of each its checkpoints, oldest first."""
    kept = set(also_kept).union(*(chunks_of(store, job[-NUM_KEPT_CHECKPOINTS:]) for job in jobs))
    for job in jobs:
        for ref in chunks_of(store, job[:-NUM_KEPT_CHECKPOINTS]) - kept:
            store.remove(ref)
