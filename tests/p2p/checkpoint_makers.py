"""Small checkpoints with real chunks in a real store."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.checkpoints import (
    Checkpoint,
    CheckpointManifest,
    DataCursor,
    OptimizerState,
    RandomState,
    hash_weights,
    job_id_of,
)
from swarmnode.p2p.identity import Identity
from swarmnode.p2p.states import ADAMW_SUFFIXES, IndexedTensor

SIGNER = Identity(b"s" * 32)
CONFIG = {"model_type": "llama", "vocab_size": 300}
JOB = {"name": "job", "model": {"config": CONFIG}, "run": {"seed": 3}}
CHUNK = 32
"""Bytes in a chunk here, so that a small tensor has several."""


def tensor(store: BlobStore, name: str, shape: tuple[int, ...]) -> IndexedTensor:
    """A float32 tensor whose bytes follow from its name."""
    num_bytes = 4
    for dimension in shape:
        num_bytes *= dimension
    data = hashlib.shake_256(name.encode()).digest(num_bytes)
    pieces = [data[at : at + CHUNK] for at in range(0, num_bytes, CHUNK)]
    return IndexedTensor(name, "F32", shape, tuple(store.put(piece) for piece in pieces))


def state(
    store: BlobStore,
    weights: dict[str, tuple[int, ...]],
    suffixes: tuple[str, ...] = ("", *ADAMW_SUFFIXES),
) -> tuple[IndexedTensor, ...]:
    """Weights and their moments, sorted by name."""
    names = [(name + suffix, shape) for name, shape in weights.items() for suffix in suffixes]
    return tuple(tensor(store, name, shape) for name, shape in sorted(names))


WEIGHTS: dict[str, tuple[int, ...]] = {
    "embed.weight": (5, 4),
    "layers.0.w": (4, 4),
    "layers.1.w": (4, 4),
}


def manifest(store: BlobStore, step: int = 20, **changes: Any) -> CheckpointManifest:
    atoms = changes.pop("atoms", None) or state(store, WEIGHTS)
    job = changes.pop("job_manifest", JOB)
    fields: dict[str, Any] = {
        "job": job_id_of(job),
        "job_manifest": job,
        "step": step,
        "generation": 2,
        "parent": None,
        "data": DataCursor(next_step=step),
        "random": RandomState(seed=3),
        "optimizer": OptimizerState(step=step),
        "loss": 3.25,
        "weights_sha256": hash_weights(atoms, store.read),
        "software": {"swarmnode": "0.1.0"},
        "created_at_s": 1.7e9,
        "coordinator": SIGNER.peer,
        "atoms": atoms,
    }
    return CheckpointManifest(**{**fields, **changes})


def checkpoint(store: BlobStore, step: int = 20, **changes: Any) -> Checkpoint:
    return Checkpoint.signed(manifest(store, step, **changes), SIGNER)


def recoded(made: Checkpoint, path: Iterable[str], value: Any) -> bytes:
    """The file with one key changed, its signature left as it was."""
    body = json.loads(made.to_bytes())
    *keys, last = path
    inner = body
    for key in keys:
        inner = inner[key]
    inner[last] = value
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def tokenizer(folder: Path) -> dict[str, Path]:
    """A file that travels with the checkpoint."""
    path = folder / "source-tokenizer.json"
    path.write_text("{}")
    return {"tokenizer.json": path}
