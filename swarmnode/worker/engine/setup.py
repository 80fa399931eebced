"""Everything that stays the same within one generation, made from a Configure."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils import deterministic

from swarmnode.compression.codec import Codec, Payload, get_codec
from swarmnode.domain import Generation, JobId, PeerId, Plan, SlotId
from swarmnode.errors import DataError
from swarmnode.manifest import Manifest
from swarmnode.messages import Configure, Frame, FrameKind, Message
from swarmnode.worker.engine.batches import Batches
from swarmnode.worker.training.expected import ExpectedFrames, Role
from swarmnode.worker.training.groups import Group, Parameter, StageGroups, stage_groups
from swarmnode.worker.training.reduce import FlatGradient
from swarmnode.worker.training.state import StageState, initial_state, loaded_state

Send = Callable[[Message, Payload], None]
"""Gives a message to the daemon."""
Post = Callable[[Frame, Payload], None]
"""Sends a frame to the slot that it is addressed to, wherever that is hosted."""


@dataclass(frozen=True)
class Setup:
    """One generation of one job on one node."""

    job: JobId
    peer: PeerId
    plan: Plan
    manifest: Manifest
    device: str
    hosted: tuple[SlotId, ...]
    stages: dict[int, StageState]
    stage_groups: dict[int, StageGroups]
    codecs: dict[Role, Codec]
    batches: Batches | None
    """Absent where nothing trains, and on nodes between the first and the last stage."""
    expected: ExpectedFrames
    accumulators: dict[SlotId, dict[int, FlatGradient]]
    """Per slot and group: the slot's own gradient of the step at hand."""
    reduced: dict[int, FlatGradient]
    """Per group: the summed gradient of the step at hand, with views for every hosted stage."""

    @property
    def generation(self) -> Generation:
        return self.plan.generation

    @property
    def trains(self) -> bool:
        return self.manifest.kind == "train"

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
    ) -> Frame:
        """A frame of this job and generation."""
        return Frame(
            self.job, self.generation, step, kind, source, target,
            microbatch, group, part, tuple(shape), evaluate,
        )  # fmt: skip


def make_stages(
    configure: Configure, manifest: Manifest, held: Mapping[int, StageState]
) -> dict[int, StageState]:
    """The stages of a generation: kept, drawn from the seed or loaded, as each source says.

    Raises: DataError if a stage that is to be kept is not held at exactly the step.
    """
    how_by_stage = {stage: (how, path) for stage, how, path in configure.sources}
    stages: dict[int, StageState] = {}
    for stage in sorted({slot.stage for slot in configure.plan.hosted_by(configure.peer)}):
        layers = configure.plan.layers[stage]
        how, path = how_by_stage.get(stage, ("keep", ""))
        if how == "keep":
            stages[stage] = _kept(held.get(stage), stage, layers, configure.step)
        elif how == "load":
            stages[stage] = loaded_state(
                manifest, layers, configure.device, path=Path(path), step=configure.step
            )
        elif configure.step == 0:
            stages[stage] = initial_state(manifest, layers, configure.device)
        else:
            raise DataError(f"stage {stage} cannot be at step {configure.step} from the seed")
    return stages


def _kept(state: StageState | None, stage: int, layers: tuple[int, int], step: int) -> StageState:
    if state is None or state.layers != layers:
        raise DataError(f"stage {stage} with layers {layers} is not held here")
    if state.step != step:
        raise DataError(f"stage {stage} is held at step {state.step}, not {step}")
    return state


def make_setup(configure: Configure, manifest: Manifest, stages: dict[int, StageState]) -> Setup:
    """Lay out gradients, frames and data for a generation whose stages are here.

    Raises: ManifestError for an unknown codec, DataError if data that a slot reads is missing.
    """
    plan, peer, trains = configure.plan, configure.peer, manifest.kind == "train"
    hosted = plan.hosted_by(peer)
    codecs: dict[Role, Codec] = {
        "activation": get_codec(manifest.codecs.activation),
        "activation_gradient": get_codec(manifest.codecs.activation_gradient),
        "gradient": get_codec(manifest.codecs.gradient),
    }
    by_stage = {s: _groups_of(state, s, plan) for s, state in stages.items() if trains}
    groups: dict[int, Group] = {g.index: g for found in by_stage.values() for g, _ in found.groups}
    reads_data = trains and any(slot.stage in (0, plan.num_stages - 1) for slot in hosted)
    batches = Batches(manifest, Path(configure.blob_directory)) if reads_data else None
    batch, module = manifest.batch, next(iter(stages.values())).module
    if trains and batch.sequence_length > module.max_positions:
        raise DataError(
            f"batch.sequence_length = {batch.sequence_length} is more than the model's "
            f"{module.max_positions} positions"
        )
    expected = ExpectedFrames(
        plan=plan,
        peer=peer,
        hidden_shape=(batch.rows, batch.sequence_length, module.hidden_size),
        num_microbatches=batch.num_microbatches if trains else 0,
        num_evaluation_microbatches=(
            batches.num_evaluation_microbatches if batches else manifest.run.evaluate_microbatches
        ),
        groups=groups,
        wire_bytes=lambda role, shape: codecs[role].wire_bytes(shape),
    )
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
        configure.job, peer, plan, manifest, device, hosted, stages, by_stage,
        codecs, batches, expected, accumulators, reduced,
    )  # fmt: skip


def _groups_of(state: StageState, stage: int, plan: Plan) -> StageGroups:
    shapes = {name: tuple(p.shape) for name, p in state.module.parameters_by_name().items()}
    return stage_groups(
        stage=stage,
        num_stages=plan.num_stages,
        num_slots=plan.num_slots,
        shapes=shapes,
        tied=state.module.tied,
    )


def _all_parameters(index: int, by_stage: Mapping[int, StageGroups]) -> list[Parameter]:
    """A group's parameters under their names in every hosted stage."""
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
