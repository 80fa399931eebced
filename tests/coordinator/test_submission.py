"""From a job file to a manifest: everything named becomes content, and what is wrong is said."""

import asyncio
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from swarmnode.coordinator.submission import TOKENIZER_FILES, Prepared, prepare, unpack_folder
from swarmnode.domain import BlobRef, ModelFacts, PeerId
from swarmnode.errors import DataError, ManifestError, UserError
from swarmnode.manifest import JobFile, Manifest, PlacementConfig, check, parse_job
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.states import IndexedTensor, TensorIndex, write_safetensors
from swarmnode.tokenizer import load_tokenizer, write_byte_tokenizer
from swarmnode.tokens import TokenIndex

ME = PeerId("me")
FACTS = ModelFacts(2, 1000, 500, 500, 16, 300, 128, False)
CONFIG = {"model_type": "llama", "vocab_size": 300}
TEXT = "All that is named becomes content. " * 100


class World:
    """A folder with text, a config and a store; a model whose sizes are told, not computed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = FACTS
        self.store = BlobStore(folder / "blobs")
        self.asked: list[tuple[Mapping[str, Any], int, tuple[str, ...] | None]] = []
        self.grids: list[JobFile] = []
        (folder / "text.txt").write_text(TEXT)
        (folder / "config.json").write_text(json.dumps(CONFIG))

    async def _facts_of(
        self, config: Mapping[str, Any], stages: int, stored: tuple[str, ...] | None
    ) -> ModelFacts:
        self.asked.append((config, stages, stored))
        return self.facts

    async def _decide_grid(self, job: JobFile, facts: ModelFacts) -> PlacementConfig:
        self.grids.append(job)
        return PlacementConfig(**job.placement.model_dump(exclude_none=True))

    def prepare(self, **changes: Any) -> Prepared:
        raw = {
            "name": "job",
            "model": {"config": "config.json"},
            "data": {"path": "text.txt"},
            "batch": {"sequence_length": 16},
            **changes,
        }
        raw = {key: value for key, value in raw.items() if value is not None}
        job = parse_job(raw, base=self.folder, source="job")
        scratch = self.folder / "scratch"
        scratch.mkdir(exist_ok=True)
        return asyncio.run(prepare(job, ME, self.store, scratch, self._facts_of, self._decide_grid))

    def tokens(self, ref: BlobRef) -> list[int]:
        """The token ids of an index."""
        index = TokenIndex.parse(self.store.read(ref))
        data = b"".join(self.store.read(chunk) for chunk in index.chunks)
        return list(struct.unpack(f"<{index.num_tokens}H", data))

    def model_folder(self, name: str = "model") -> Path:
        """A Hugging Face folder with two tensors, and a tokenizer of its own."""
        folder = self.folder / name
        write_byte_tokenizer(folder)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        rows = [
            IndexedTensor(name, "F32", (2,), (self.store.put(data),))
            for name, data in (("a.weight", b"12345678"), ("b.weight", b"abcdefgh"))
        ]
        write_safetensors(folder / "model.safetensors", rows, self.store.read)
        for row in rows:
            self.store.remove(row.chunks[0])
        return folder


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_job_to_train_becomes_content_that_is_in_the_store(world: World) -> None:
    prepared = world.prepare(run={"seed": 7}, placement={"stages": 2})
    manifest = prepared.manifest
    assert prepared.facts == FACTS
    assert world.asked == [(CONFIG, 2, None)]
    assert (manifest.name, manifest.kind, manifest.submitter) == ("job", "train", ME)
    assert (manifest.model.config, manifest.model.weights) == (CONFIG, None)
    assert (manifest.run.seed, manifest.placement.stages) == (7, 2)
    assert manifest.data is not None
    tokens = world.tokens(manifest.data.train) + world.tokens(manifest.data.validation)
    assert tokens == [*TEXT.encode(), 256]  # a byte is its own token, and the document ends
    assert check(Manifest, json.loads(manifest.canonical()), "manifest") == manifest


def test_no_path_of_this_machine_is_in_the_manifest(world: World) -> None:
    world.model_folder()
    for model in ({"config": "config.json"}, {"path": "model"}):
        assert str(world.folder).encode() not in world.prepare(model=model).manifest.canonical()


def test_the_same_job_submitted_twice_has_two_ids_and_one_content(world: World) -> None:
    one, other = world.prepare().manifest, world.prepare().manifest
    assert one.job != other.job
    assert (one.data, one.tokenizer) == (other.data, other.tokenizer)


def test_the_tokenizer_travels_and_is_the_same_there(world: World, tmp_path: Path) -> None:
    manifest = world.prepare().manifest
    folder = tmp_path / "there"
    unpack_folder(world.store.read(manifest.tokenizer), folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("Gr\u00fc\u00dfe") == list("Gr\u00fc\u00dfe".encode())
    assert {path.name for path in folder.iterdir()} <= set(TOKENIZER_FILES)


def test_weights_are_served_from_their_own_file_by_content(world: World) -> None:
    folder = world.model_folder()
    manifest = world.prepare(kind="serve", model={"path": "model"}, data=None).manifest
    assert manifest.data is None
    assert manifest.num_steps == 0
    assert world.asked == [(CONFIG, 2, ("a.weight", "b.weight"))]
    assert manifest.model.weights is not None
    index = TensorIndex.from_json(world.store.read(manifest.model.weights))
    contents = {t.name: world.store.read(t.chunks[0]) for t in index.tensors}
    assert contents == {"a.weight": b"12345678", "b.weight": b"abcdefgh"}
    assert index.step == 0
    (folder / "model.safetensors").unlink()
    assert not world.store.has(index.tensors[0].chunks[0])


def test_a_config_may_be_a_file_a_folder_or_a_table(world: World) -> None:
    world.model_folder()
    for config in ("config.json", "model", CONFIG):
        manifest = world.prepare(model={"config": config}).manifest
        assert (manifest.model.config, manifest.model.weights) == (CONFIG, None)


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"batch": {"sequence_length": 129}}, ManifestError, "over the model's 128 positions"),
        ({"model": {"config": "none.json"}}, DataError, "No such file"),
        ({"model": {"config": "text.txt"}}, DataError, "is not JSON"),
        ({"model": {"config": "list.json"}}, DataError, "is not a JSON object"),
        ({"model": {"config": "latin.json"}}, DataError, "is not JSON"),
        ({"model": {"config": "huge.json"}}, DataError, "is it a model config?"),
        ({"model": {"path": "none"}}, DataError, "is not a folder"),
        ({"model": {"path": "config.json"}}, DataError, "is not a folder"),
        ({"model": {"path": "bare"}}, DataError, "no safetensors file"),
        ({"data": {"path": "none"}}, DataError, "no such file or folder"),
        ({"data": {"path": "empty.txt"}}, DataError, "empty"),
        ({"tokenizer": "none"}, DataError, "no tokenizer.json"),
        ({"tokenizer": "broken"}, DataError, "is not a tokenizer"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    world: World, changes: dict[str, Any], error: type[UserError], says: str
) -> None:
    for name in ("bare", "broken"):
        (world.folder / name).mkdir()
    (world.folder / "bare" / "config.json").write_text("{}")
    (world.folder / "broken" / "tokenizer.json").write_text("{}")
    (world.folder / "list.json").write_text("[]")
    (world.folder / "latin.json").write_bytes(b'{"a": "\xff"}')
    (world.folder / "huge.json").write_bytes(b" " * ((1 << 20) + 1))
    (world.folder / "empty.txt").touch()
    with pytest.raises(error) as caught:
        world.prepare(**changes)
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_with_fewer_tokens_than_the_tokenizer_is_refused(world: World) -> None:
    world.facts = ModelFacts(2, 1000, 500, 500, 16, 256, 128, False)
    with pytest.raises(DataError, match="257 tokens but the model's vocabulary only 256"):
        world.prepare()


def test_a_long_sequence_is_no_matter_where_nothing_is_trained(world: World) -> None:
    world.model_folder()
    changes = {"kind": "serve", "model": {"path": "model"}, "data": None}
    assert world.prepare(**changes, batch={"sequence_length": 129}).facts == FACTS


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", b"[]", b"null", b'{"../up": ""}', b'{"config.json": ""}', b'{"/etc/x": "y"}',
     b'{"tokenizer.json": "\\ud800"}', b'{"tokenizer.json": 7}', b'{"tokenizer.json": null}'],
)  # fmt: skip
def test_a_folder_of_a_stranger_with_other_files_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(DataError):
        unpack_folder(data, tmp_path / "there")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["config", "folder"])
def test_json_that_is_nested_too_deeply_is_refused(world: World, what: str) -> None:
    deep = "[" * 100_000
    (world.folder / "deep.json").write_text(deep)

    def read() -> None:
        if what == "config":
            world.prepare(model={"config": "deep.json"})
        else:
            unpack_folder(deep.encode(), world.folder / "there")

    with pytest.raises(DataError):
        read()


def test_a_file_of_the_tokenizer_that_is_not_text_is_refused(world: World) -> None:
    folder = world.folder / "tokens"
    write_byte_tokenizer(folder)
    (folder / "special_tokens_map.json").write_bytes(b"\xff")
    with pytest.raises(DataError):
        world.prepare(tokenizer="tokens")


def test_who_asks_for_deltas_where_no_sample_comes_again_is_told(tmp_path: Path) -> None:
    world, codecs = World(tmp_path), {"activation": "aq/int4/32"}
    (note,) = world.prepare(codecs=codecs, run={"steps": 10}).notes
    assert "10 steps see each sample 0.8 times; use int4/32" in note, note
    assert world.prepare(codecs=codecs, run={"steps": 100}).notes == ()
    assert world.prepare(run={"steps": 10}).notes == ()


def test_delta_caches_are_as_large_as_asked_but_no_larger_than_the_text(world: World) -> None:
    codecs = {"activation": "aq/int4/32"}
    manifest = world.prepare(codecs=codecs).manifest
    assert manifest.data is not None
    num_windows = (TokenIndex.parse(world.store.read(manifest.data.train)).num_tokens - 1) // 16
    whole = num_windows * 16 * FACTS.hidden_size * 2
    assert 0 < manifest.codecs.delta_cache_bytes == whole < 1 << 20
    assert world.grids[-1].codecs == manifest.codecs, "the grid is chosen for these caches"
    for given, kept in ((1000, 1000), (1 << 40, whole)):
        asked = world.prepare(codecs={**codecs, "delta_cache_bytes": given}).manifest
        assert asked.codecs.delta_cache_bytes == kept
    assert world.prepare().manifest.codecs.delta_cache_bytes == 1 << 30, "which nothing uses"
