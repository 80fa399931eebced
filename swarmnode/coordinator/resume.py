"""Going on from a checkpoint folder: what is checked before, and what its owner should know."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarmnode.domain import BlobRef, ModelFacts
from swarmnode.errors import DataError, ManifestError
from swarmnode.manifest import DataContent, JobFile
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.checkpoint_files import (
    MANIFEST_FILE,
    FolderChunks,
    audit_folder,
    read_checkpoint,
)
from swarmnode.p2p.checkpoints import Checkpoint
from swarmnode.p2p.states import MOMENT_SUFFIXES, IndexedTensor, TensorIndex


@dataclass(frozen=True)
class Resumed:
    """A checkpoint folder that a job goes on from; every byte of it was checked."""

    folder: Path
    checkpoint: Checkpoint

    @property
    def config(self) -> dict[str, Any]:
        return self.checkpoint.manifest.config

    @property
    def weights(self) -> tuple[IndexedTensor, ...]:
        """The atoms without moments."""
        atoms = self.checkpoint.manifest.atoms
        return tuple(atom for atom in atoms if not atom.name.endswith(MOMENT_SUFFIXES))


def read_resumed(job: JobFile) -> Resumed | None:
    """The checkpoint that a job names, read and checked completely.

    Raises: DataError for the first damage, ManifestError if the job cannot go on from it.
    """
    if job.model.resume is None:
        return None
    folder = Path(job.model.resume)
    if not (folder / MANIFEST_FILE).is_file():
        raise DataError(
            f"model.resume: {folder} has no {MANIFEST_FILE}; give a folder that `swarmnode "
            "checkpoint export` wrote, or use model.path for weights alone"
        )
    problems = audit_folder(folder).problems
    if problems:
        raise DataError(f"model.resume: {folder}: {problems[0]}")
    resumed = Resumed(folder, read_checkpoint(folder / MANIFEST_FILE))
    manifest = resumed.checkpoint.manifest
    if job.kind == "train":
        kind = "adamw" if job.codecs.sync is None else "outer"
        if kind != manifest.optimizer.kind:
            has = "with" if kind == "adamw" else "without"
            raise ManifestError(
                f"model.resume: {folder} is of a job {has} codecs.sync, whose optimizer has "
                "another state; set it alike, or use model.path for weights alone"
            )
        if kind == "adamw" and len(resumed.weights) == len(manifest.atoms):
            raise DataError(f"model.resume: {folder} holds no moments; use model.path for weights")
        if job.run.steps <= manifest.step:
            raise ManifestError(
                f"run.steps = {job.run.steps}, but the checkpoint is after step {manifest.step}; "
                "raise run.steps, it counts from the very beginning"
            )
    return resumed


def check_fits(resumed: Resumed, facts: ModelFacts) -> None:
    """Compare what is stored with what the model's config says. Raises: DataError, one line."""
    outside, per_layer = 0, dict.fromkeys(range(facts.num_layers), 0)
    for atom in resumed.weights:
        number = next((int(part) for part in atom.name.split(".") if part.isdecimal()), None)
        size = 1
        for dimension in atom.shape:
            size *= dimension
        if number is None:
            outside += size
        elif number in per_layer:
            per_layer[number] += size
        else:
            raise DataError(f"model.resume: {atom.name} is in none of {facts.num_layers} layers")
    expected = facts.first_weights + facts.last_weights
    if outside != expected:
        raise DataError(
            f"model.resume: embeddings, norm and head hold {outside} weights, but the model with "
            f"a vocabulary of {facts.vocab_size} has {expected}"
        )
    largest = max(per_layer.values())
    if largest != facts.layer_weights or min(per_layer.values()) == 0:
        raise DataError(
            f"model.resume: a layer holds {largest} weights, but the model's {facts.layer_weights}"
        )


def publish(resumed: Resumed, store: BlobStore, *, trains: bool) -> BlobRef:
    """Serve the folder's chunks as they lie; the index of the state, which keeps its moments."""
    atoms = resumed.checkpoint.manifest.atoms if trains else resumed.weights
    store.add_ranges(FolderChunks(resumed.folder).ranges(atoms))
    return store.put(TensorIndex(resumed.checkpoint.manifest.step, atoms).to_json())


def notes(resumed: Resumed, job: JobFile, data: DataContent | None) -> tuple[str, ...]:
    """What differs from the job that made the checkpoint, so that its next losses do too."""
    if job.kind != "train":
        return ()
    before = resumed.checkpoint.manifest.job_manifest
    step = resumed.checkpoint.manifest.step
    now: dict[str, Any] = {
        "batch": job.batch.model_dump(mode="json"),
        "optimizer": job.optimizer.model_dump(mode="json"),
        "run.seed": job.run.seed,
        "run.steps": job.run.steps,
        "run.compute": job.run.compute,
        "codecs.sync": job.codecs.sync,
        "data": data.model_dump(mode="json") if data else None,
    }
    differ = [name for name, value in now.items() if value != _at(before, name)]
    if not differ:
        return ()
    what = f"{', '.join(differ)} differ from the run that made the checkpoint"
    return (f"{what}: training goes on from step {step}, but with other losses than it had",)


def _at(value: Mapping[str, Any], path: str) -> Any:
    found: Any = value
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
