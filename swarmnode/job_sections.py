"""Parts of a job description that are the same in a job file and in a manifest."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from swarmnode.domain import PeerId
from swarmnode.job_codecs import Section

ComputeDtype = Literal["float32", "bfloat16"]


class OptimizerConfig(Section):
    """AdamW with decoupled weight decay on matrices only (Loshchilov and Hutter, 2019)."""

    learning_rate: float = Field(default=3e-3, gt=0, le=10)
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(default=0.01, ge=0, lt=1)
    """Decoupled decay of parameters with two or more dimensions."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps of linear rise to the peak."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the rate falls after the warm-up."""
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    """Share of the peak that is left at the last step."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 for no clipping."""

    def learning_rate_at(self, step: int, num_steps: int) -> float:
        """The rate of step `step` (from 0) in a run of `num_steps`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        span = max(1, num_steps - self.warmup_steps)
        done = min(1.0, (step - self.warmup_steps) / span)
        if self.schedule == "constant":
            return self.learning_rate
        linear = self.schedule == "linear"
        fall = 1.0 - done if linear else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.learning_rate * (self.final_fraction + (1.0 - self.final_fraction) * fall)


class BatchConfig(Section):
    """The shape of one step: numerics depend on it, never on who computes it."""

    rows: int = Field(default=4, ge=1, le=4096)
    """Sequences in one microbatch."""
    sequence_length: int = Field(default=128, ge=2, le=1 << 20)
    """Tokens in one sequence."""
    num_microbatches: int = Field(default=4, ge=1, le=4096)
    """Microbatches in one step, a multiple of the number of slots."""


NumLayers = Annotated[int, Field(ge=1)]
StageNumber = Annotated[int, Field(ge=0, lt=256)]


class PlacementWish(Section):
    """What the author of a job says about the grid; whatever is left open is chosen for the
    machines that are here when the job is submitted."""

    stages: int | None = Field(default=None, ge=1, le=256)
    """Number of pipeline stages, S; chosen for the machines that are here unless given."""
    slots: int | None = Field(default=None, ge=1, le=256)
    """Number of virtual replicas of each stage, V; chosen unless given."""
    layers: tuple[NumLayers, ...] | None = Field(default=None, min_length=1, max_length=256)
    """Layers of each stage, the first stage first; chosen unless given."""
    pins: dict[PeerId, StageNumber] = Field(default={}, max_length=4096)
    """Peers that hold this stage or nothing: peer id = stage."""
    min_peers: int | None = Field(default=None, ge=1)
    """Fewest machines to run on; one per stage unless given."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        stages = self.stages
        if self.pins and stages is None:
            raise ValueError("placement.pins needs placement.stages; say how many there are")
        if self.layers is not None and stages is not None and len(self.layers) != stages:
            raise ValueError(f"placement.layers has {len(self.layers)} stages, not {stages}")
        if stages is not None and any(stage >= stages for stage in self.pins.values()):
            raise ValueError(f"placement.pins names a stage that is not one of 0 .. {stages - 1}")
        return self


class PlacementConfig(PlacementWish):
    """The grid of stages and slots, decided: part of a manifest."""

    stages: int = Field(default=2, ge=1, le=256)
    """Number of pipeline stages, S."""
    slots: int = Field(default=1, ge=1, le=256)
    """Number of virtual replicas of each stage, V."""

    @property
    def fewest_peers(self) -> int:
        return self.min_peers if self.min_peers is not None else self.stages


class RunConfig(Section):
    """How long, from which seed, in which precision."""

    steps: int = Field(default=200, ge=0, le=100_000_000)
    """Optimizer steps; 0 only serves."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seed of the initial weights and of the order of samples."""
    compute: ComputeDtype = "float32"
    """Precision of matrix products; weights and optimizer stay float32."""
    evaluate_every: int = Field(default=0, ge=0)
    """Steps between evaluations on held-out data; 0 for one at the end only."""
    evaluate_microbatches: int = Field(default=16, ge=1, le=65536)
    """Microbatches of held-out data in one evaluation (fewer where there is less data)."""
    checkpoint_every: int = Field(default=100, ge=0)
    """Steps between checkpoints; 0 for one at the end only."""
    deterministic: bool = False
    """Same job, same bits, whoever dies: one thread per worker; give placement.slots and layers."""
    ahead: int = Field(default=0, ge=0, le=256)
    """More microbatches under way in all stages but the last: slow links need them."""

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A key that older versions do not know is there only where it says something."""
        found: dict[str, Any] = serialize(self)
        if self.ahead == 0:
            found.pop("ahead", None)
        return found
