"""Signed manifests follow what the journal names, and go with the chunks."""

import asyncio
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "p2p"))
import checkpoint_makers as make

from swarmnode.coordinator.checkpoints import CheckpointDesk, shelf_of
from swarmnode.coordinator.events import CheckpointRecord
from swarmnode.coordinator.progress import Progress
from swarmnode.domain import BlobRef, PeerId
from swarmnode.errors import NotFoundError
from swarmnode.manifest import Manifest, ModelContent, RunConfig
from swarmnode.p2p.blob_store import BlobStore, blob_path
from swarmnode.p2p.checkpoint_files import audit_folder
from swarmnode.p2p.states import IndexedTensor, TensorIndex
from swarmnode.tokenizer import write_byte_tokenizer


class World:
    """One job with checkpoints as a journal and a store hold them."""

    def __init__(self, folder: Path, *, start_step: int = 0) -> None:
        self.store = BlobStore(folder / "blobs")
        self.logged: list[str] = []
        manifest = Manifest(
            name="job",
            model=ModelContent(config=make.CONFIG, checkpoint="d" * 64 if start_step else None),
            run=RunConfig(steps=100, seed=3),
            tokenizer=BlobRef("0" * 64, 1),
            submitter=PeerId("me"),
            submitted_at_s=0.0,
            start_step=start_step,
        )
        progress = Progress(manifest, 0.0)
        for step in range(start_step, 60):
            progress.committed(step, 5.0 - step / 100, None)
        self.records: list[CheckpointRecord] = []
        self.job: Any = SimpleNamespace(
            manifest=manifest,
            facts=SimpleNamespace(tied=False),
            directory=folder / "job",
            tokenizer_directory=folder / "job" / "tokenizer",
            ledger=SimpleNamespace(generation=4, progress=progress, plan=None),
            runner=SimpleNamespace(checkpoints=self.records, settled=self._settled),
        )
        self.on_their_way: list[int] = []
        """Steps of checkpoints that the job's state shows and its journal lacks."""
        write_byte_tokenizer(self.job.tokenizer_directory)
        self.desk = CheckpointDesk(make.SIGNER, self.store, lambda: [self.job], self._log)

    async def _settled(self) -> None:
        while self.on_their_way:
            self.record(self.on_their_way.pop(0))

    def _log(self, event: str, **fields: Any) -> None:
        self.logged.append(f"{event} {fields['step']}: {fields['reason']}")

    def record(self, step: int) -> None:
        """A checkpoint of two stages."""
        atoms = make.state(self.store, make.WEIGHTS)
        first, last = (self._index(step, atoms, layer) for layer in ("layers.1", "layers.0"))
        self.records.append(CheckpointRecord(step, (first, last)))

    def _index(self, step: int, atoms: Iterable[IndexedTensor], without: str) -> BlobRef:
        kept = tuple(atom for atom in atoms if without not in atom.name)
        return self.store.put(TensorIndex(step, kept).to_json())

    def steps(self) -> list[int]:
        return [each.manifest.step for each in asyncio.run(self.desk.listed(self.job))]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_each_checkpoint_gets_a_signed_manifest_that_names_the_one_before(world: World) -> None:
    world.record(10)
    world.record(20)
    one, other = asyncio.run(world.desk.listed(world.job))
    assert one.is_authentic
    assert other.is_authentic
    assert (one.manifest.parent, other.manifest.parent) == (None, one.sha256)
    body = other.manifest
    assert (body.step, body.generation, body.job) == (20, 4, world.job.manifest.job)
    assert (body.data.next_step, body.random.seed, body.optimizer.step) == (20, 3, 20)
    assert body.loss == pytest.approx(5.0 - 0.19)
    assert body.atoms == make.state(world.store, make.WEIGHTS)
    assert {"swarmnode", "python", "torch"} <= body.software.keys()
    assert world.logged == []


def test_the_two_newest_are_kept_and_a_lost_manifest_is_written_again(world: World) -> None:
    for step in (10, 20, 30):
        world.record(step)
    assert world.steps() == [20, 30]
    shelf_of(world.job).path(20).unlink()
    assert world.steps() == [20, 30]
    world.record(40)
    world.desk.forget_replaced()
    assert shelf_of(world.job).steps() == (30,)
    assert world.steps() == [30, 40]


def test_what_the_state_shows_is_waited_for(world: World) -> None:
    """A job serves a moment before its last checkpoint is in the journal."""
    world.record(10)
    world.on_their_way.append(20)
    assert world.steps() == [10, 20]


def test_a_resumed_job_names_what_it_came_from_and_its_own_losses(tmp_path: Path) -> None:
    world = World(tmp_path, start_step=20)
    world.record(30)
    (made,) = asyncio.run(world.desk.listed(world.job))
    assert made.manifest.parent == "d" * 64
    assert made.manifest.loss == pytest.approx(5.0 - 0.29)


def test_going_back_in_a_resumed_job_forgets_the_right_losses(tmp_path: Path) -> None:
    progress = World(tmp_path, start_step=20).job.ledger.progress
    assert len(progress.losses) == 40
    progress.rewind(30)
    assert len(progress.losses) == 10
    progress.committed(30, 1.5, None)
    assert progress.losses[-1] == 1.5
    progress.rewind(20)
    assert progress.losses == []


def test_a_damaged_chunk_costs_that_manifest_only(world: World) -> None:
    world.record(10)
    assert world.steps() == [10]
    atom = make.state(world.store, make.WEIGHTS)[0]
    blob_path(world.store.root, atom.chunks[0]).write_bytes(b"")
    world.record(20)  # writes the chunk again
    blob_path(world.store.root, atom.chunks[0]).write_bytes(b"")
    assert world.steps() == [10]
    assert world.logged[0].startswith("no manifest of a checkpoint 20: ")
    (found,) = asyncio.run(world.desk.audited(world.job, lambda _: None))
    assert len(found.problems) == 1
    assert found.problems[0].startswith(f"{atom.name}: chunk 1 of ")


def test_a_checkpoint_is_exported_with_its_tokenizer(world: World, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no checkpoint yet"):
        asyncio.run(world.desk.find(world.job, None))
    world.record(10)
    world.record(20)

    async def export() -> None:
        checkpoint = await world.desk.find(world.job, 10)
        await world.desk.exported(world.job, checkpoint, tmp_path / "out", lambda _: None)

    asyncio.run(export())
    assert audit_folder(tmp_path / "out").problems == ()
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    with pytest.raises(NotFoundError, match="after step 15; there are: 10, 20"):
        asyncio.run(world.desk.find(world.job, 15))
