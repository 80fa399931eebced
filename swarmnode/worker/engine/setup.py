"""Everything that stays the same within one generation, made from a Configure."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.utils import deterministic

from swarmnode.codec_specs import SMALL_ELEMENTS, CodecSpec, for_size, parse_spec
from swarmnode.domain import Generation, JobId, PeerId, Plan, SlotId
from swarmnode.engine_messages import Configure
from swarmnode.errors import DataError
from swarmnode.fields import Losses
from swarmnode.manifest import CodecConfig, Manifest
from swarmnode.messages import (
    Frame,
    FrameKind,
)
from swarmnode.traces import OnSpan, ignore_span
from swarmnode.worker.engine.batches import Batches, sample_map
from swarmnode.worker.engine.boundaries import Boundaries
from swarmnode.worker.engine.ports import Log
from swarmnode.worker.files import stage_directory
from swarmnode.worker.training.deltas import Deltas, DeltaSizes
from swarmnode.worker.training.expected import ExpectedFrames, Role
from swarmnode.worker.training.groups import Group, Parameter, StageGroups, stage_groups
from swarmnode.worker.training.local import LocalSlots, LocalSteps
from swarmnode.worker.training.meter import CodingMeter
from swarmnode.worker.training.reduce import FlatGradient, ShardCodecs
from swarmnode.worker.training.residuals import Residuals
from swarmnode.worker.training.samples import SampleMap
from swarmnode.worker.training.state import StageState


@dataclass(frozen=True)
class Setup:
    """One generation of one job on one node."""

    job: JobId
    peer: PeerId
    plan: Plan
    manifest: Manifest
    device: str
    hosted: tuple[SlotId, ...]
    """The slots that compute here."""
    held: tuple[SlotId, ...]
    """Those and the shadows."""
    stages: dict[int, StageState]
    """The state of every stage that is held."""
    stage_groups: dict[int, StageGroups]
    boundaries: Boundaries
    """The codecs of what crosses from stage to stage."""
    gradient: CodecSpec
    """Of what is summed among the slots of a stage."""
    residuals: Residuals
    local: LocalSteps | None
    """Where slots train on their own between commits."""
    deltas: Deltas | None
    """Where hidden states of training travel as changes."""
    meter: CodingMeter
    batches: Batches | None
    """Absent where nothing trains, and on nodes between the first and the last stage."""
    expected: ExpectedFrames
    accumulators: dict[SlotId, dict[int, FlatGradient]]
    """Per slot and group: the slot's own gradient of the step at hand."""
    reduced: dict[int, FlatGradient]
    """Per group: the summed gradient of the step at hand, with views for every stage held."""
    logs: Mapping[int, Log]
    """Where each stage's updates go."""
    on_span: OnSpan = ignore_span
    """Takes where the time of computing goes."""

    @property
    def generation(self) -> Generation:
        return self.plan.generation

    @property
    def trains(self) -> bool:
        return self.manifest.kind == "train"

    @property
    def reads_data(self) -> bool:
        return self.batches is not None

    def autocast(self) -> torch.autocast:
        """The precision of training's matrix products, as a context."""
        enabled = self.trains and self.manifest.run.compute == "bfloat16"
        kind = "cuda" if self.device.startswith("cuda") else "cpu"
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=enabled)

    def is_last(self, slot: SlotId) -> bool:
        return slot.stage == self.plan.num_stages - 1

    def is_hosted(self, slot: SlotId) -> bool:
        return self.plan.host(slot) == self.peer

    def frame(
        self,
        kind: FrameKind,
        step: int,
        source: SlotId,
        target: SlotId,
        shape: Sequence[int],
        *,
        microbatch: int = 0,
        group: int = 0,
        part: int = 0,
        evaluate: bool = False,
        losses: Losses = (),
    ) -> Frame:
        """A frame of this job and generation."""
        return Frame(
            self.job, self.generation, step, kind, source, target,
            microbatch, group, part, tuple(shape), evaluate, losses,
        )  # fmt: skip


def make_setup(
    configure: Configure,
    manifest: Manifest,
    stages: dict[int, StageState],
    make_log: Callable[[Path], Log],
    residuals: Residuals,
    local: LocalSlots,
    meter: CodingMeter,
    on_span: OnSpan = ignore_span,
) -> Setup:
    """Lay out gradients, frames and data for a generation whose stages are here.

    Raises: ManifestError for an unknown codec, DataError if data that a slot reads is missing,
    CapacityError if there is no room for what is to be remembered of hidden states.
    """
    plan, peer, trains = configure.plan, configure.peer, manifest.kind == "train"
    hosted, held = plan.hosted_by(peer), plan.held_by(peer)
    activation = parse_spec(manifest.codecs.activation)
    boundaries = Boundaries(manifest.codecs, plan)
    gradient = parse_spec(manifest.codecs.share)
    by_stage = {
        s: groups_of(state, s, plan, manifest.codecs) for s, state in stages.items() if trains
    }
    groups: dict[int, Group] = {g.index: g for found in by_stage.values() for g, _ in found.groups}
    reads_data = trains and any(slot.stage in (0, plan.num_stages - 1) for slot in hosted)
    batches = Batches(manifest, Path(configure.blob_directory)) if reads_data else None
    batch, module = manifest.batch, next(iter(stages.values())).module
    if trains and batch.sequence_length > module.max_positions:
        raise DataError(
            f"batch.sequence_length = {batch.sequence_length} is more than the model's "
            f"{module.max_positions} positions"
        )
    hidden_shape = (batch.rows, batch.sequence_length, module.hidden_size)
    sizes = DeltaSizes(activation, hidden_shape) if activation.memory == "delta" else None
    expected = ExpectedFrames(
        plan=plan,
        peer=peer,
        hidden_shape=hidden_shape,
        num_microbatches=manifest.microbatches_per_step if trains else 0,
        num_evaluation_microbatches=(
            batches.num_evaluation_microbatches if batches else manifest.run.evaluate_microbatches
        ),
        groups=groups,
        fits=_sizes_rule(boundaries, ShardCodecs(gradient), sizes),
    )
    directory = Path(configure.log_directory)
    logs = {stage: make_log(stage_directory(directory, stage)) for stage in stages if trains}
    deltas = None
    if sizes is not None and trains and plan.num_stages > 1:
        samples = sample_map(manifest, Path(configure.blob_directory))
        folder = directory if manifest.codecs.delta_cache_on_disk else None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        deltas = Deltas(
            activation, sizes, plan, hosted, partial(_keys, samples),
            manifest.codecs.delta_cache_bytes, folder,
        )  # fmt: skip
    device = configure.device
    accumulators = {
        slot: {
            g.index: FlatGradient(p, g.num_values, device) for g, p in by_stage[slot.stage].groups
        }
        for slot in hosted
        if trains
    }
    reduced = {
        index: FlatGradient(_all_parameters(index, by_stage), group.num_values, device)
        for index, group in groups.items()
    }
    return Setup(
        configure.job, peer, plan, manifest, device, hosted, held, stages, by_stage,
        boundaries, gradient, residuals, local.of(manifest, stages, device), deltas, meter, batches,
        expected, accumulators, reduced, logs, on_span,
    )  # fmt: skip


def _sizes_rule(
    boundaries: Boundaries, shards: ShardCodecs, sizes: DeltaSizes | None
) -> Callable[[Role, Frame, int], bool]:
    """Which tensors can have how many bytes."""

    def fits(role: Role, frame: Frame, num_bytes: int) -> bool:
        if role == "activation" and sizes is not None:
            return sizes.fits(num_bytes)
        if role == "gradient" or role == "small_gradient":
            is_small = role == "small_gradient"
            codec = shards.for_values(math.prod(frame.shape), is_small=is_small)
        else:
            codec = boundaries.codec(role, frame.source, frame.target)
        return num_bytes == codec.wire_bytes(frame.shape)

    return fits


def _keys(samples: SampleMap, step: int, microbatch: int) -> tuple[bytes, ...]:
    """A name for each sample of a microbatch: where it starts in the tokens."""
    return tuple(start.to_bytes(8) for start in samples.sample_offsets(step, microbatch))


def groups_of(state: StageState, stage: int, plan: Plan, codecs: CodecConfig) -> StageGroups:
    """The reduction groups of a stage, from the names and shapes of its parameters."""
    gradient = parse_spec(codecs.share)
    is_coarse = for_size(gradient, 0) != gradient
    shapes = {name: tuple(p.shape) for name, p in state.module.parameters_by_name().items()}
    return stage_groups(
        stage=stage,
        num_stages=plan.num_stages,
        num_slots=plan.num_slots,
        shapes=shapes,
        tied=state.module.tied,
        small_values=SMALL_ELEMENTS if is_coarse else 0,
        is_gathered=codecs.gathers,
    )


def _all_parameters(index: int, by_stage: Mapping[int, StageGroups]) -> list[Parameter]:
    """A group's parameters under their names in every stage that is held."""
    pairs = [pair for found in by_stage.values() for pair in found.groups]
    return [p for group, parameters in pairs if group.index == index for p in parameters]


def set_determinism(device: str, *, trains: bool) -> None:
    """Make equal inputs give equal bits on one class of device, where it matters: in training.

    An operation that cannot do so on CUDA raises RuntimeError when it is used.
    """
    is_strict = trains and device.startswith("cuda")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(is_strict)
    # Filling costs time, and we read nothing that was not written.
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
