"""What a node that may take over keeps of the jobs of others."""

import asyncio
from pathlib import Path

from swarmnode.coordinator.events import CheckpointRecord
from swarmnode.coordinator.journal import Journal
from swarmnode.coordinator.retention import forget_replaced
from swarmnode.coordinator.standby import StandbyJournals
from swarmnode.coordinator.succession import Succession
from swarmnode.domain import BlobRef, Generation, JobId, PeerId, Plan
from swarmnode.p2p.blob_server import serve_blobs
from swarmnode.p2p.blob_store import BlobStore, Range
from swarmnode.p2p.blobs import BlobClient
from swarmnode.p2p.memory import MemoryNetwork
from swarmnode.p2p.states import IndexedTensor, TensorIndex
from swarmnode.papers import Papers
from tests.coordinator.bench import manifest

ME, COORDINATOR = PeerId("b"), PeerId("a")


def put_checkpoint(store: BlobStore, step: int) -> tuple[CheckpointRecord, set[BlobRef]]:
    """A state of two chunks, one of which every checkpoint shares."""
    chunks = (store.put(b"the same"), store.put(b"%d" % step))
    index = TensorIndex(step, (IndexedTensor("weight", "U8", (9,), chunks),))
    ref = store.put(index.to_json())
    return CheckpointRecord(step, (ref,)), {ref, *chunks}


async def test_a_standby_keeps_as_many_checkpoints_as_the_coordinator(tmp_path: Path) -> None:
    async with MemoryNetwork() as network:
        await keeps_two(network, tmp_path)


async def keeps_two(network: MemoryNetwork, tmp_path: Path) -> None:
    job = manifest()
    source, store = BlobStore(tmp_path / "a"), BlobStore(tmp_path / "b")
    serve_blobs(network.transport(COORDINATOR), source, lambda _peer, _job: True)
    plan = Plan(Generation(1), ((0, 4),), ((ME,),), COORDINATOR, voters=(COORDINATOR, ME))
    papers = Papers(job, b"", b"", plan, b"")
    journal, journals = Journal(tmp_path / "journal"), StandbyJournals(tmp_path / "standby")
    blobs, troubles, kept = BlobClient(network.transport(ME), store), [], []

    def forget(_ended: JobId | None) -> bool:
        forget_replaced(store, list(journals.checkpoints().values()), frozenset())
        return True

    own = tmp_path / "export"
    own.write_bytes(b"the same")
    for step in range(4):
        record, refs = put_checkpoint(source, step)
        store.add_ranges([Range(source.put(b"the same"), own, 0)])
        store.put(b"%d" % step, is_borrowed=True)
        journal.append(record)
        kept.append(refs)
        ((_, line),) = journal.lines(step)
        async with asyncio.TaskGroup() as group:  # ends when everything is fetched
            succession = Succession(
                ME, journals, store, blobs, lambda _job: papers, lambda _papers: None,
                forget, lambda _job: None, group,
                lambda *trouble, **facts: troubles.append((trouble, facts)),
            )  # fmt: skip
            await succession.entry(job.job, step, line)
        assert all(map(store.has, refs))
        store.drop_ranges(own)
        store.give_back(refs)
        assert all(map(store.has, refs)), "not only as long as somebody else needs them"
    journal.close()
    assert troubles == []
    assert all(map(store.has, kept[2] | kept[3]))
    assert not any(map(store.has, (kept[0] | kept[1]) - kept[3]))


def test_a_chunk_that_a_newer_checkpoint_of_another_job_has_stays(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    records, refs = zip(*(put_checkpoint(store, step) for step in range(4)), strict=True)
    forget_replaced(store, [records, records[:2]], frozenset())
    assert all(map(store.has, set().union(*refs)))
    forget_replaced(store, [records], refs[0])
    assert all(map(store.has, refs[0] | refs[2] | refs[3]))
    assert not any(map(store.has, refs[1] - refs[3]))
