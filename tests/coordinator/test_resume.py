"""Going on from a checkpoint folder: what becomes of it, what is refused and what is said."""

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "p2p"))
import checkpoint_makers as make

from swarmnode.coordinator.submission import Prepared, prepare
from swarmnode.domain import BlobRef, ModelFacts, PeerId
from swarmnode.errors import DataError, ManifestError, UserError
from swarmnode.manifest import JobFile, Manifest, PlacementConfig, check, parse_job
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.checkpoint_files import write_folder
from swarmnode.p2p.checkpoints import OptimizerState, job_id_of
from swarmnode.p2p.states import TensorIndex
from swarmnode.tokenizer import write_byte_tokenizer

FACTS = ModelFacts(2, 16, 20, 0, 4, 300, 128, False)
"""Of `make.WEIGHTS`."""


async def decide_grid(job: JobFile, facts: ModelFacts) -> PlacementConfig:
    return PlacementConfig(stages=1, slots=1)


class World:
    """A home with a store, text, and a folder to resume from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = FACTS
        self.store = BlobStore(folder / "blobs")
        self.stored: tuple[str, ...] | None = None
        (folder / "text.txt").write_text("A checkpoint goes on. " * 100)

    async def _facts_of(
        self, config: Mapping[str, Any], stages: int, stored: tuple[str, ...] | None
    ) -> ModelFacts:
        assert config == make.CONFIG
        self.stored = stored
        return self.facts

    def exported(self, **changes: Any) -> Path:
        """A checkpoint folder, `saved`, whose chunks are in no store of ours."""
        scratch = BlobStore(self.folder / "scratch-blobs")
        target, words = self.folder / "saved", self.folder / "words"
        write_byte_tokenizer(words)
        texts = {path.name: path for path in words.iterdir()}
        write_folder(target, make.checkpoint(scratch, **changes), scratch.read, texts)
        return target

    def prepare(self, **changes: Any) -> Prepared:
        raw = {
            "name": "job",
            "model": {"resume": "saved"},
            "data": {"path": "text.txt"},
            "batch": {"sequence_length": 16},
            **changes,
        }
        raw = {key: value for key, value in raw.items() if value is not None}
        job = parse_job(raw, base=self.folder, source="job")
        scratch = self.folder / "scratch"
        scratch.mkdir(exist_ok=True)
        return asyncio.run(
            prepare(job, PeerId("me"), self.store, scratch, self._facts_of, decide_grid)
        )


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_weights_moments_and_step_go_on(world: World) -> None:
    folder = world.exported(step=20)
    manifest = world.prepare().manifest
    assert manifest.start_step == 20
    assert manifest.model.config == make.CONFIG
    assert world.stored == tuple(sorted(make.WEIGHTS)), "the model is asked about weights alone"
    assert manifest.model.weights is not None
    index = TensorIndex.from_json(world.store.read(manifest.model.weights))
    made = make.checkpoint(BlobStore(world.folder / "scratch-blobs"), 20)
    assert (index.step, index.tensors) == (20, made.manifest.atoms)
    assert manifest.model.checkpoint == made.sha256
    for ref in index.chunks():
        assert len(world.store.read(ref)) == ref.num_bytes
    assert str(folder).encode() not in manifest.canonical()
    assert check(Manifest, json.loads(manifest.canonical()), "manifest") == manifest


def test_the_step_is_part_of_what_is_signed(world: World) -> None:
    world.exported(step=20)
    manifest = world.prepare().manifest
    other = manifest.model_copy(update={"start_step": 19})
    assert other.job != manifest.job


def test_serving_takes_the_weights_alone(world: World) -> None:
    world.exported(step=20)
    prepared = world.prepare(kind="serve", data=None)
    assert (prepared.manifest.start_step, prepared.notes) == (0, ())
    assert prepared.manifest.model.weights is not None
    index = TensorIndex.from_json(world.store.read(prepared.manifest.model.weights))
    assert {tensor.name for tensor in index.tensors} == set(make.WEIGHTS)


def test_the_same_batch_seed_and_data_are_worth_no_word_and_others_are(world: World) -> None:
    world.exported(step=20)
    first = json.loads(world.prepare().manifest.canonical())
    (world.folder / "saved").rename(world.folder / "old")
    world.exported(step=20, job_manifest=first, job=job_id_of(first))
    assert world.prepare().notes == ()
    (world.folder / "other.txt").write_text("Other words. " * 200)
    (note,) = world.prepare(
        data={"path": "other.txt"},
        run={"seed": 1},
        batch={"sequence_length": 16, "rows": 2},
    ).notes
    assert note.startswith("batch, run.seed, data differ from the run that made the checkpoint")
    assert "step 20" in note


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        ("no folder", DataError, "has no manifest.json"),
        ("flipped", DataError, "layers.1.w::exp_avg_sq: chunk 2 of 2"),
        ("vocabulary", DataError, "the model with a vocabulary of 301 has 24"),
        ("layer", DataError, "a layer holds 16 weights, but the model's 17"),
        ("fewer layers", DataError, "layers.1.w is in none of 1 layers"),
        ("tokens", DataError, "257 tokens but the model's vocabulary only 256"),
        ("steps", ManifestError, "run.steps = 20, but the checkpoint is after step 20"),
        ("config", DataError, "config.json is not the model's"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    world: World, damage: str, error: type[UserError], says: str
) -> None:
    folder, changes = world.exported(step=20), {}
    match damage:
        case "no folder":
            folder.rename(world.folder / "elsewhere")
        case "flipped":
            path = folder / "atoms-00000.safetensors"
            path.write_bytes(path.read_bytes()[:-1] + b"\0")
        case "vocabulary":
            world.facts = ModelFacts(2, 16, 24, 0, 4, 301, 128, False)
        case "layer":
            world.facts = ModelFacts(2, 17, 20, 0, 4, 300, 128, False)
        case "fewer layers":
            world.facts = ModelFacts(1, 16, 20, 0, 4, 300, 128, False)
        case "tokens":
            world.facts = ModelFacts(2, 16, 20, 0, 4, 256, 128, False)
        case "steps":
            changes = {"run": {"steps": 20}}
        case "config":
            (folder / "config.json").write_text("{}")
    with pytest.raises(error) as caught:
        world.prepare(**changes)
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_local_steps_go_on_from_what_local_steps_left_and_from_nothing_else(world: World) -> None:
    world.exported(step=20)
    with pytest.raises(ManifestError, match=r"without codecs.sync, whose optimizer has another"):
        world.prepare(codecs={"sync": "diloco"})
    (world.folder / "saved").rename(world.folder / "old")
    scratch = BlobStore(world.folder / "scratch-blobs")
    outer = OptimizerState(kind="outer", step=20)
    atoms = make.state(scratch, make.WEIGHTS, ("", "::outer_momentum"))
    world.exported(step=20, atoms=atoms, optimizer=outer)
    prepared = world.prepare(codecs={"sync": "diloco"})
    assert prepared.manifest.start_step == 20
    assert world.stored == tuple(sorted(make.WEIGHTS))
    with pytest.raises(ManifestError, match=r"with codecs.sync, whose optimizer has another"):
        world.prepare()
    (world.folder / "saved").rename(world.folder / "older")
    bare = tuple(atom for atom in atoms if "::" not in atom.name)
    world.exported(step=20, atoms=bare, optimizer=outer)  # an outer step without a momentum
    (note,) = world.prepare(codecs={"sync": "sparseloco"}).notes
    assert "codecs.sync" in note


def test_weights_without_moments_are_not_trained_on_as_if_they_had_some(world: World) -> None:
    scratch = BlobStore(world.folder / "scratch-blobs")
    atoms = make.state(scratch, make.WEIGHTS)
    world.exported(atoms=tuple(atom for atom in atoms if "::" not in atom.name))
    with pytest.raises(DataError, match="holds no moments"):
        world.prepare()
    assert world.prepare(kind="serve", data=None).manifest.model.weights is not None


def test_exactly_one_source_of_the_model_is_named() -> None:
    raw = {"name": "x", "model": {"resume": "a", "path": "b"}, "data": {"path": "c"}}
    with pytest.raises(ManifestError, match="exactly one of"):
        parse_job(raw, base=Path("/"), source="job")


def test_an_index_of_a_stranger_names_no_file(world: World) -> None:
    """What is served are chunks by content, never by path."""
    world.exported(step=20)
    weights = world.prepare().manifest.model.weights
    assert weights is not None
    assert b"safetensors" not in world.store.read(BlobRef(weights.sha256, weights.num_bytes))
