"""From a job file to a manifest: every local path becomes content in the node's own store."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarmnode.codec_specs import DELTA_VALUE_BYTES
from swarmnode.coordinator import resume
from swarmnode.coordinator.corpus import build_corpus
from swarmnode.domain import BlobRef, ModelFacts, PeerId
from swarmnode.errors import DataError, ManifestError
from swarmnode.manifest import (
    DataContent,
    JobBase,
    JobFile,
    Manifest,
    ModelContent,
    PlacementConfig,
)
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.states import index_tensors
from swarmnode.tensorfiles import TensorSpan, read_header
from swarmnode.tokenizer import TextTokenizer, load_tokenizer, write_byte_tokenizer
from swarmnode.tokens import TokenIndex

MAX_CONFIG_BYTES = 1 << 20
MAX_TOKENIZER_FILE_BYTES = 12 << 20
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)

FactsOf = Callable[[Mapping[str, Any], int, tuple[str, ...] | None], Awaitable[ModelFacts]]
DecideGrid = Callable[[JobFile, ModelFacts], Awaitable[PlacementConfig]]
"""Chooses what a job leaves open of its grid. Raises: CapacityError."""


@dataclass(frozen=True)
class Prepared:
    """A job that can be started."""

    manifest: Manifest
    facts: ModelFacts
    notes: tuple[str, ...] = ()
    """What its submitter should know, a line each."""


async def prepare(
    job: JobFile,
    me: PeerId,
    store: BlobStore,
    scratch: Path,
    facts_of: FactsOf,
    decide_grid: DecideGrid,
) -> Prepared:
    """Read and check everything that a job file names, and store it by content.

    Raises: ManifestError, DataError, CapacityError, each with one clear line.
    """
    resumed = await asyncio.to_thread(resume.read_resumed, job)
    spans: Mapping[str, TensorSpan] | None = None
    stored: tuple[str, ...] | None
    if resumed is not None:
        config, stored = resumed.config, tuple(atom.name for atom in resumed.weights)
    else:
        config, spans = await asyncio.to_thread(_read_model, job)
        stored = tuple(spans) if spans else None
    facts = await facts_of(config, job.placement.stages or 2, stored)
    if resumed is not None:
        resume.check_fits(resumed, facts)
    if job.kind == "train" and job.batch.sequence_length > facts.max_positions:
        raise ManifestError(
            f"batch.sequence_length = {job.batch.sequence_length} is over the model's "
            f"{facts.max_positions} positions; lower it"
        )
    folder = await asyncio.to_thread(_tokenizer_folder, job, scratch, facts.max_positions)
    tokenizer = load_tokenizer(folder)
    if tokenizer.num_tokens > facts.vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.num_tokens} tokens but the model's vocabulary only "
            f"{facts.vocab_size}; give a model with vocab_size >= {tokenizer.num_tokens}"
        )
    data, num_tokens = None, 0
    if job.codecs.keeps_deltas:  # how much there is decides how large its caches are
        data = await asyncio.to_thread(_publish_data, job, tokenizer, facts, store)
    if data is not None:
        num_tokens = TokenIndex.parse(store.read(data.train)).num_tokens
        job = _with_caches_for(num_tokens, job, facts)
    placement = await decide_grid(job, facts)
    if job.codecs.sync is not None and facts.tied and placement.stages > 1:
        raise ManifestError(
            f"codecs.sync: the model's tied embeddings lie on two of {placement.stages} stages and "
            "would go apart between exchanges; set placement.stages = 1 or leave codecs.sync out"
        )
    data = data or await asyncio.to_thread(_publish_data, job, tokenizer, facts, store)
    content, start_step = ModelContent(config=config), 0
    if resumed is not None:
        trains = job.kind == "train"
        weights = await asyncio.to_thread(resume.publish, resumed, store, trains=trains)
        made_by = resumed.checkpoint
        content = ModelContent(config=config, weights=weights, checkpoint=made_by.sha256)
        start_step = made_by.manifest.step if trains else 0
    elif spans is not None:
        weights = await asyncio.to_thread(_publish_weights, spans, store)
        content = ModelContent(config=config, weights=weights)
    shared = {name: getattr(job, name) for name in JobBase.model_fields}
    manifest = Manifest(
        **shared,
        placement=placement,
        model=content,
        data=data,
        tokenizer=await asyncio.to_thread(_publish_folder, folder, store),
        submitter=me,
        submitted_at_s=time.time(),
        start_step=start_step,
    )
    notes = resume.notes(resumed, job, data) if resumed else ()
    return Prepared(manifest, facts, notes + _delta_notes(manifest, num_tokens))


def _read_model(job: JobFile) -> tuple[dict[str, Any], Mapping[str, TensorSpan] | None]:
    """The model's config, and where its tensors lie if it has any yet."""
    source = job.model
    if isinstance(source.config, dict):
        return source.config, None
    if source.path is not None:
        folder = Path(source.path)
        if not folder.is_dir():
            raise DataError(f"model.path: {folder} is not a folder")
        return _read_config(folder / "config.json"), read_header(folder)
    assert source.config is not None
    path = Path(source.config)
    return _read_config(path / "config.json" if path.is_dir() else path), None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise DataError(f"{path} is over {MAX_CONFIG_BYTES} bytes; is it a model config?")
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"model config {path}: {error.strerror}; check the path") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"model config {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise DataError(f"model config {path} is not a JSON object")
    return config


def _tokenizer_folder(job: JobFile, scratch: Path, max_positions: int) -> Path:
    if job.tokenizer != "bytes":
        return Path(job.tokenizer)
    given = job.model.path or job.model.resume
    if given is not None and (Path(given) / "tokenizer.json").exists():
        return Path(given)
    folder = scratch / "byte-tokenizer"
    write_byte_tokenizer(folder, max_positions=max_positions)
    return folder


def _publish_weights(spans: Mapping[str, TensorSpan], store: BlobStore) -> BlobRef:
    index, ranges = index_tensors(spans, 0)
    store.add_ranges(ranges)
    return store.put(index.to_json())


def _publish_data(
    job: JobFile, tokenizer: TextTokenizer, facts: ModelFacts, store: BlobStore
) -> DataContent | None:
    if job.data is None:
        return None
    corpus = build_corpus(
        Path(job.data.path),
        store,
        sequence_length=job.batch.sequence_length,
        vocab_size=facts.vocab_size,
        encode=tokenizer.encode,
        document_end=min(tokenizer.end_ids, default=None),
        validation_fraction=job.data.validation_fraction,
        max_bytes=job.data.max_bytes,
    )
    return DataContent(
        train=store.put(corpus.train.canonical()),
        validation=store.put(corpus.validation.canonical()),
    )


def _with_caches_for(num_tokens: int, job: JobFile, facts: ModelFacts) -> JobFile:
    """The job with delta caches that have no more room than all its windows of text take."""
    num_values = (num_tokens - 1) // job.batch.sequence_length * job.batch.sequence_length
    most = num_values * facts.hidden_size * DELTA_VALUE_BYTES
    room = min(job.codecs.delta_cache_bytes, most)
    codecs = job.codecs.model_copy(update={"delta_cache_bytes": room})
    return job.model_copy(update={"codecs": codecs})


def _delta_notes(manifest: Manifest, num_tokens: int) -> tuple[str, ...]:
    """What to know where hidden states are to travel as changes, but no sample comes again."""
    codecs, batch = manifest.codecs, manifest.batch
    if not num_tokens:
        return ()
    steps = manifest.num_steps - manifest.start_step
    epochs = steps * batch.num_microbatches * batch.rows * batch.sequence_length / num_tokens
    if epochs > 1.5:
        return ()
    note = (
        f"codecs.activation = {codecs.activation} saves bytes from a sample's second visit on, but "
        f"{steps} steps see each sample {epochs:.1f} times; use {codecs.activation[3:]}"
    )
    return (note,)


def _publish_folder(folder: Path, store: BlobStore) -> BlobRef:
    """A tokenizer's folder as one blob: file name to text."""
    texts: dict[str, str] = {}
    for name in TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            if path.stat().st_size > MAX_TOKENIZER_FILE_BYTES:
                raise DataError(f"{path} is over {MAX_TOKENIZER_FILE_BYTES >> 20} MiB")
            try:
                texts[name] = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"tokenizer file {path} cannot be read: {error}") from None
    return store.put(json.dumps(texts, sort_keys=True).encode())


def unpack_folder(data: bytes, folder: Path) -> None:
    """Write the files of `_publish_folder` into `folder`. Raises: DataError, OSError."""
    try:
        texts = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"a tokenizer blob that is not JSON: {error}") from None
    if not isinstance(texts, dict) or not set(texts) <= set(TOKENIZER_FILES):
        raise DataError("a tokenizer blob with unknown files")
    try:
        files = {name: text.encode() for name, text in texts.items()}
    except (AttributeError, UnicodeEncodeError):
        raise DataError("a tokenizer blob with a file that is not text") from None
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
