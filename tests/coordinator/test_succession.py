"""What a node that may take over keeps of the jobs of others."""

import asyncio
import contextlib
from pathlib import Path

import pytest

from swarmnode.coordinator import succession
from swarmnode.coordinator.events import CheckpointRecord, SubmittedRecord
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
from tests.coordinator.bench import FACTS, manifest

ME, COORDINATOR = PeerId("b"), PeerId("a")


async def not_now(_papers: Papers) -> None:
    """Nobody stands for election here."""


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
    source, store = BlobStore(tmp_path / "a"), BlobStore(tmp_path / "b")
    job = manifest().model_copy(update={"data": None, "tokenizer": source.put(b"words")})
    serve_blobs(network.transport(COORDINATOR), source, lambda _peer, _job: True)
    plan = Plan(Generation(1), ((0, 4),), ((ME,),), COORDINATOR, voters=(COORDINATOR, ME))
    papers = Papers(job, b"", b"", plan, b"")
    journal, journals = Journal(tmp_path / "journal"), StandbyJournals(tmp_path / "standby")
    blobs, troubles, kept = BlobClient(network.transport(ME), store), [], []
    ready: list[JobId] = []

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
            found = Succession(
                ME, journals, store, blobs, lambda _job: papers, not_now,
                forget, ready.append, group,
                lambda *trouble, **facts: troubles.append((trouble, facts)),
            )  # fmt: skip
            found._loadable.add(job.tokenizer)  # that takes a child
            await found.entry(job.job, step, line)
        assert all(map(store.has, refs))
        store.drop_ranges(own)
        store.give_back(refs)
        assert all(map(store.has, refs)), "not only as long as somebody else needs them"
    journal.close()
    assert troubles == []
    assert ready == [job.job] * 4
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


@pytest.mark.parametrize("is_named", [True, False])
async def test_whom_a_leaving_coordinator_named_stands_at_once(
    is_named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(succession, "HEIR_S", 0.0)
    job, journals = manifest(), StandbyJournals(tmp_path / "standby")
    with contextlib.closing(Journal(tmp_path / "journal")) as journal:
        journal.append(SubmittedRecord(FACTS))
        ((number, line),) = journal.lines(0)
    journals.take(job.job, number, line)
    plan = Plan(Generation(1), ((0, 4),), ((ME,),), COORDINATOR, voters=(COORDINATOR, ME))
    papers = Papers(job, b"", b"", plan, b"")
    stood: asyncio.Queue[Papers] = asyncio.Queue()
    async with MemoryNetwork() as network, asyncio.TaskGroup() as group:
        store = BlobStore(tmp_path / "b")
        found = Succession(
            ME, journals, store, BlobClient(network.transport(ME), store), lambda _job: papers,
            stood.put, lambda _job: True, lambda _job: None, group, lambda *_, **__: None,
        )  # fmt: skip
        found._loadable.add(job.tokenizer)
        monkeypatch.setattr(store, "has", lambda _ref: True)
        if is_named:
            found.named(job.job)
        found.orphaned(job.job)
        try:
            async with asyncio.timeout(1.0 if not is_named else 20.0):
                assert await stood.get() is papers
            assert is_named
        except TimeoutError:
            assert not is_named, "it waits for the coordinator, which may come back"
        found.followed(job.job)


async def test_a_standby_that_cannot_fetch_what_it_needs_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(succession, "PROVIDE_AGAIN_S", (0.01,) * 100)
    source, store = BlobStore(tmp_path / "a"), BlobStore(tmp_path / "b")
    job = manifest().model_copy(update={"data": None, "tokenizer": source.put(b"words")})
    plan = Plan(Generation(1), ((0, 4),), ((ME,),), COORDINATOR, voters=(COORDINATOR, ME))
    papers = Papers(job, b"", b"", plan, b"")
    troubles: list[str] = []
    ready = asyncio.Event()
    async with MemoryNetwork() as network, asyncio.TaskGroup() as group:
        coordinator = network.transport(COORDINATOR)
        serve_blobs(coordinator, source, lambda _peer, _job: len(troubles) >= 2)
        found = Succession(
            ME, StandbyJournals(tmp_path / "standby"), store,
            BlobClient(network.transport(ME), store), lambda _job: papers, not_now,
            lambda _job: True, lambda _job: ready.set(), group,
            lambda event, **_: troubles.append(event),
        )  # fmt: skip
        found._loadable.add(job.tokenizer)
        found.adopted(job.job, plan)
        async with asyncio.timeout(20.0):
            await ready.wait()
    assert troubles == ["not ready to take over"] * 2
    assert store.has(job.tokenizer)
