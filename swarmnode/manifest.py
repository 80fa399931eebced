"""What a researcher asks for (JobFile, TOML with local paths) and what travels (Manifest).

A Manifest names everything by content hash, so any peer can check what it was given. Both are
frozen and closed: an unknown key or an impossible value is refused with one clear line.
"""

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from swarmnode.domain import BlobRef, JobId, PeerId
from swarmnode.errors import ManifestError
from swarmnode.job_codecs import CodecConfig as CodecConfig
from swarmnode.job_codecs import Section as Section
from swarmnode.job_sections import BatchConfig as BatchConfig
from swarmnode.job_sections import OptimizerConfig as OptimizerConfig
from swarmnode.job_sections import PlacementConfig as PlacementConfig
from swarmnode.job_sections import PlacementWish as PlacementWish
from swarmnode.job_sections import RunConfig as RunConfig

ModelT = TypeVar("ModelT", bound=BaseModel)
ConfigT = TypeVar("ConfigT")
MAX_CONFIG_DEPTH = 32


class JobBase(Section):
    """What a job file and a manifest share."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the job, and of the model that it serves."""
    kind: Literal["train", "serve"] = "train"
    """Whether the job trains, or only serves given weights."""
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    codecs: CodecConfig = CodecConfig()
    run: RunConfig = RunConfig()

    @property
    def num_steps(self) -> int:
        return self.run.steps if self.kind == "train" else 0

    @property
    def microbatches_per_step(self) -> int:
        """Of one committed step: with local steps a round of them."""
        return self.batch.num_microbatches * self.codecs.num_local_steps

    @property
    def update_clip_norm(self) -> float:
        """Largest norm of what a commit applies; 0 for any. Local steps clip for themselves."""
        return self.optimizer.clip_norm if self.codecs.sync is None else 0.0

    @property
    def follows_links(self) -> bool:
        """Whether the codecs of a boundary depend on the link that it crosses."""
        return self.codecs.follow_links and self.kind == "train"

    @model_validator(mode="before")
    @classmethod
    def _same_bits(cls, raw: Any) -> Any:
        """A preset follows links by itself, but not where who computes must not change a bit."""
        if not isinstance(raw, dict):
            return raw
        run, codecs = raw.get("run"), raw.get("codecs")
        if not isinstance(run, dict) or not isinstance(codecs, dict) or "preset" not in codecs:
            return raw
        is_strict = run.get("deterministic") is True
        return {**raw, "codecs": {"follow_links": False, **codecs}} if is_strict else raw

    @model_validator(mode="after")
    def _agrees_on_links(self) -> Self:
        if self.run.deterministic and self.codecs.follow_links:
            raise ValueError("run.deterministic does not go with codecs.follow_links; choose one")
        return self


MAX_STEP_MICROBATCHES = 4096
"""What messages have room for."""


def _check_local_steps(job: JobBase) -> None:
    if job.microbatches_per_step > MAX_STEP_MICROBATCHES:
        raise ValueError(
            f"batch.num_microbatches = {job.batch.num_microbatches}, {job.codecs.num_local_steps} "
            f"times between two exchanges, is over {MAX_STEP_MICROBATCHES}; lower codecs.sync every"
        )


def _check_grid(batch: BatchConfig, slots: int | None) -> None:
    if slots is not None and batch.num_microbatches % slots:
        raise ValueError(
            f"batch.num_microbatches = {batch.num_microbatches} is not a multiple of "
            f"placement.slots = {slots}"
        )


def _check_pinned(run: RunConfig, placement: PlacementWish) -> None:
    """Where stages are cut and how microbatches are dealt out decides the bits of every sum."""
    if run.deterministic and (placement.slots is None or placement.layers is None):
        raise ValueError("run.deterministic needs placement.slots and placement.layers")


def _check_depth(config: ConfigT) -> ConfigT:
    """A config nested deeper than any real one would break the JSON that is signed."""
    level: list[Any] = [config] if isinstance(config, dict) else []
    for _ in range(MAX_CONFIG_DEPTH):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return config
    raise ValueError(f"nested deeper than {MAX_CONFIG_DEPTH}")


class ModelSource(Section):
    """Where the model comes from: exactly one of the three."""

    config: str | dict[str, Any] | None = None
    """A Hugging Face config: a path to config.json, or the table itself; weights start random."""
    path: str | None = None
    """A Hugging Face folder with config.json and safetensors; training goes on from it."""
    resume: str | None = None
    """A folder of `swarmnode checkpoint export`: weights, moments and step go on."""

    _is_shallow = field_validator("config")(_check_depth)

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(each is not None for each in (self.config, self.path, self.resume)) != 1:
            raise ValueError("give exactly one of model.config, model.path and model.resume")
        return self


class DataSource(Section):
    """Text to train on."""

    path: str
    """A text file, a folder of text files, or JSONL with a `text` field."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of the tokens that is held out."""
    max_bytes: int | None = Field(default=None, gt=0)
    """Read at most this much text."""


class OpenJob(JobBase):
    """A job of whose grid some may be open still."""

    placement: PlacementWish = PlacementWish()


class JobFile(OpenJob):
    """A job as its author writes it; paths are relative to the file."""

    model: ModelSource
    data: DataSource | None = None
    tokenizer: str = "bytes"
    """A tokenizer folder, or `bytes` for one token per byte."""

    @property
    def open(self) -> OpenJob:
        """The part that the choice of a grid reads."""
        return OpenJob(**{name: getattr(self, name) for name in OpenJob.model_fields})

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> Self:
        if self.kind == "train" and self.data is None:
            raise ValueError("a job of kind train needs a [data] section with a path")
        if self.kind == "serve" and self.model.path is None and self.model.resume is None:
            raise ValueError("a job of kind serve needs model.path, a folder with weights")
        _check_grid(self.batch, self.placement.slots)
        _check_pinned(self.run, self.placement)
        _check_local_steps(self)
        return self


class ModelContent(Section):
    """The model by content."""

    config: dict[str, Any]
    """The Hugging Face config."""
    weights: BlobRef | None = None
    """The tensor index of the state to start from; random weights when absent."""
    checkpoint: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """The hash of the checkpoint manifest that the job goes on from."""

    _is_shallow = field_validator("config")(_check_depth)


class DataContent(Section):
    """The data by content: two token indexes."""

    train: BlobRef
    validation: BlobRef


class PlacedJob(JobBase):
    """A job whose grid is decided: what placement and prediction read."""

    placement: PlacementConfig = PlacementConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        _check_grid(self.batch, self.placement.slots)
        _check_pinned(self.run, self.placement)
        _check_local_steps(self)
        return self


class Manifest(PlacedJob):
    """A job as it travels: immutable, content-addressed, signed by its submitter."""

    model: ModelContent
    data: DataContent | None = None
    tokenizer: BlobRef
    """A JSON object of file name to text: the tokenizer's folder."""
    start_step: int = Field(default=0, ge=0, le=100_000_000)
    """Committed steps in the state to start from; training goes on with this one."""
    submitter: PeerId
    submitted_at_s: float = Field(ge=0)
    """Wall clock; also makes two submissions of the same job distinct."""

    def canonical(self) -> bytes:
        """The bytes that are hashed and signed: sorted JSON without spaces."""
        return json.dumps(
            self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")
        ).encode()

    @property
    def job(self) -> JobId:
        return JobId(hashlib.sha256(self.canonical()).hexdigest()[:16])


def load_job_file(path: Path) -> JobFile:
    """Read a job file; relative paths in it become absolute.

    Raises: ManifestError with one line that names the key and what is wrong with it.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such file; give the path of a job file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ManifestError(f"{path}: not readable as TOML: {error}") from error
    return parse_job(raw, base=path.resolve().parent, source=str(path))


def parse_job(raw: dict[str, Any], *, base: Path, source: str) -> JobFile:
    """Check a job description; `base` is what its relative paths are relative to."""
    job = check(JobFile, raw, source)

    def absolute(value: str) -> str:
        try:
            return str((base / Path(value).expanduser()).resolve())
        except (ValueError, OSError, RuntimeError) as error:
            raise ManifestError(f"{source}: {value!r:.80} is no path: {error}") from None

    model = job.model
    if isinstance(model.config, str):
        model = model.model_copy(update={"config": absolute(model.config)})
    if model.path is not None:
        model = model.model_copy(update={"path": absolute(model.path)})
    if model.resume is not None:
        model = model.model_copy(update={"resume": absolute(model.resume)})
    data = job.data
    if data is not None:
        data = data.model_copy(update={"path": absolute(data.path)})
    tokenizer = job.tokenizer if job.tokenizer == "bytes" else absolute(job.tokenizer)
    return job.model_copy(update={"model": model, "data": data, "tokenizer": tokenizer})


def check(kind: type[ModelT], raw: object, source: str) -> ModelT:
    """Validate `raw` against `kind`.

    Raises: ManifestError naming the first wrong key, what it got and what it needs.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            what = f"unknown key {where!r}; remove it or correct its name"
        else:
            message = first["msg"].removeprefix("Value error, ")
            what = f"{where}: {message}" if where else message
            if where and first["type"] not in ("missing", "value_error"):
                what += f" (got {first['input']!r:.60})"
        raise ManifestError(f"{source}: {what}") from None
