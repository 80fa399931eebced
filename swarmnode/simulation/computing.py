"""The worker child's computing on hashes: what `Steps` needs of models, data and optimizer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from swarmnode.domain import BlobRef, Generation, JobId, PeerId, Plan, SlotId
from swarmnode.fields import Losses
from swarmnode.manifest import Manifest
from swarmnode.messages import (
    Frame,
    FrameKind,
)
from swarmnode.simulation import history
from swarmnode.worker.engine.ports import Log, Payload, Post
from swarmnode.worker.training.expected import ExpectedFrames
from swarmnode.worker.training.groups import Group
from swarmnode.worker.training.schedule import Direction, SlotSchedule
from swarmnode.worker.training.slots import microbatches_of

SHARD_VALUES = 4


@dataclass
class StageState:
    """A stage after `step` committed steps."""

    state: bytes
    step: int


@dataclass
class ToyGrid:
    """One generation of one job on one machine: `ports.Grid` on hashes."""

    manifest: Manifest
    peer: PeerId
    plan: Plan
    states: dict[int, StageState]
    logs: Mapping[int, Log]
    on_counted: Callable[[int, int, bytes], None]
    """Called with stage, step and how often each microbatch is in an update."""
    hosted: tuple[SlotId, ...] = field(init=False)
    held: tuple[SlotId, ...] = field(init=False)
    stages: tuple[int, ...] = field(init=False)
    expected: ExpectedFrames = field(init=False)
    groups: dict[int, Group] = field(init=False)

    def __post_init__(self) -> None:
        plan, count = self.plan, self.manifest.batch.num_microbatches
        self.hosted, self.held = plan.hosted_by(self.peer), plan.held_by(self.peer)
        self.stages = plan.stages_of(self.peer)
        self.groups = {
            stage: Group(
                stage,
                tuple(SlotId(stage, slot) for slot in range(plan.num_slots)),
                SHARD_VALUES * plan.num_slots,
            )
            for stage in self.stages
        }
        self.expected = ExpectedFrames(
            plan=plan,
            peer=self.peer,
            hidden_shape=(1, 1, 1),
            num_microbatches=count,
            num_evaluation_microbatches=plan.num_slots,
            groups=self.groups,
            fits=lambda role, frame, num_bytes: (
                num_bytes
                == history.HASH_BYTES
                + (count if role == "gradient" else len(self.mark(frame.source, frame.target)))
            ),
        )

    @property
    def job(self) -> JobId:
        return self.manifest.job

    @property
    def generation(self) -> Generation:
        return self.plan.generation

    @property
    def reads_data(self) -> bool:
        return any(slot.stage in (0, self.plan.num_stages - 1) for slot in self.hosted)

    def is_last(self, slot: SlotId) -> bool:
        return slot.stage == self.plan.num_stages - 1

    def mark(self, source: SlotId, target: SlotId) -> bytes:
        """What a boundary frame ends with if its link has codecs of its own: who expects other
        codecs refuses it, as in the engine."""
        link = (self.plan.host(source), self.plan.host(target))
        found = [each.preset for each in self.plan.links if (each.source, each.target) == link]
        return b"".join(name.encode() for name in found)

    def is_hosted(self, slot: SlotId) -> bool:
        return self.plan.host(slot) == self.peer

    def frame(
        self, kind: FrameKind, step: int, source: SlotId, target: SlotId, *,
        microbatch: int = 0, part: int = 0, evaluate: bool = False,
    ) -> Frame:  # fmt: skip
        is_boundary = kind in ("activation", "activation_gradient")
        group, shape = (0, (1, 1, 1)) if is_boundary else (source.stage, (SHARD_VALUES,))
        return Frame(
            self.job, self.generation, step, kind, source, target,
            microbatch, group, part, shape, evaluate,
        )  # fmt: skip


@dataclass
class _Slot:
    schedule: SlotSchedule
    microbatches: tuple[int, ...]
    gradient: history.Accumulator
    arrived: dict[tuple[Direction, int], bytes] = field(default_factory=dict)
    inputs: dict[int, bytes] = field(default_factory=dict)
    outputs: dict[int, bytes] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)


class ToyPipeline:
    """`ports.StepPipeline`: 1F1B over hashes, with the real schedule."""

    def __init__(self, grid: ToyGrid, step: int, evaluate: bool, post: Post) -> None:
        self._grid, self._step, self._evaluate, self._post = grid, step, evaluate, post
        plan, count = grid.plan, grid.manifest.batch.num_microbatches
        self.slots: dict[SlotId, _Slot] = {}
        for slot in sorted(grid.hosted, reverse=True):
            owned = microbatches_of(
                slot.slot,
                num_slots=plan.num_slots,
                num_microbatches=plan.num_slots if evaluate else count,
            )
            schedule = SlotSchedule(
                stage=slot.stage,
                num_stages=plan.num_stages,
                microbatches=owned,
                forward_only=evaluate,
                ahead=grid.manifest.run.ahead,
            )
            self.slots[slot] = _Slot(schedule, owned, history.Accumulator.empty(count))

    def take(self, frame: Frame, payload: Payload) -> None:
        slot = self.slots[frame.target]
        direction: Direction = "forward" if frame.kind == "activation" else "backward"
        slot.arrived[direction, frame.microbatch] = bytes(payload)[: history.HASH_BYTES]
        slot.schedule.arrived(direction, frame.microbatch)

    def work(self) -> SlotId | None:
        ready = [(slot, at.schedule.next()) for slot, at in self.slots.items()]
        for direction in ("backward", "forward"):
            for slot, work in ready:
                if work is not None and work.direction == direction:
                    step = self._backward if direction == "backward" else self._forward
                    step(slot, work.microbatch)
                    self.slots[slot].schedule.done(work)
                    return slot
        return None

    def is_finished(self, slot: SlotId) -> bool:
        return self.slots[slot].schedule.is_finished

    def microbatches(self, slot: SlotId) -> tuple[int, ...]:
        return self.slots[slot].microbatches

    def losses(self, slot: SlotId) -> tuple[float, ...]:
        return tuple(self.slots[slot].losses)

    def _forward(self, slot: SlotId, microbatch: int) -> None:
        grid, at = self._grid, self.slots[slot]
        if slot.stage == 0:
            seed = grid.manifest.run.seed
            inputs = history.tokens(seed, self._step, microbatch, held_out=self._evaluate)
        else:
            inputs = at.arrived.pop(("forward", microbatch))
        output = history.forward(grid.states[slot.stage].state, inputs)
        if grid.is_last(slot):
            at.losses.append(history.loss_of(output))
        else:
            target = SlotId(slot.stage + 1, slot.slot)
            self._send("activation", slot, target, microbatch, output)
        if not self._evaluate:
            at.inputs[microbatch], at.outputs[microbatch] = inputs, output

    def _backward(self, slot: SlotId, microbatch: int) -> None:
        grid, at = self._grid, self.slots[slot]
        inputs, output = at.inputs.pop(microbatch), at.outputs.pop(microbatch)
        if grid.is_last(slot):
            gradient = history.loss_gradient(output)
        else:
            gradient = at.arrived.pop(("backward", microbatch))
        state = grid.states[slot.stage].state
        at.gradient.add(state, microbatch, inputs, gradient)
        if slot.stage > 0:
            target = SlotId(slot.stage - 1, slot.slot)
            back = history.backward(state, inputs, gradient)
            self._send("activation_gradient", slot, target, microbatch, back)

    def _send(
        self, kind: FrameKind, source: SlotId, target: SlotId, microbatch: int, value: bytes
    ) -> None:
        frame = self._grid.frame(
            kind, self._step, source, target, microbatch=microbatch, evaluate=self._evaluate
        )
        self._post(frame, value + self._grid.mark(source, target))


class ToyReduction:
    """`ports.StepReduction` over hashes: shards by owner, summed in slot order."""

    def __init__(
        self, grid: ToyGrid, step: int, gradients: Callable[[SlotId], history.Accumulator],
        post: Post,
    ) -> None:  # fmt: skip
        self._grid, self._step, self._post = grid, step, post
        self._gradients = gradients
        self._waiting: dict[tuple[int, int], dict[SlotId, bytes]] = {}
        self._reduced: dict[int, dict[int, bytes]] = {stage: {} for stage in grid.stages}
        self._logged: dict[int, BlobRef] = {}
        self._by_slot: dict[SlotId, Losses] = {}
        self._losses: Losses = ()

    def share(self, slot: SlotId, losses: Losses) -> None:
        group, gradient = self._grid.groups[slot.stage], self._gradients(slot)
        for part in range(group.num_parts):
            frame = self._grid.frame("gradient", self._step, slot, group.owner(part), part=part)
            frame = replace(frame, losses=losses)
            self._post(frame, gradient.share(part))

    def take(self, frame: Frame, payload: Payload) -> None:
        if frame.kind == "reduced":
            self._reduced[frame.group][frame.part] = bytes(payload)
            self._losses = frame.losses or self._losses
            return
        if frame.losses:
            self._by_slot[frame.source] = frame.losses
        group = self._grid.groups[frame.group]
        shares = self._waiting.setdefault((frame.group, frame.part), {})
        shares[frame.source] = bytes(payload)
        if len(shares) < len(group.members):
            return
        total = history.empty_sum(self._grid.manifest.batch.num_microbatches)
        for member in group.members:
            total = history.add_share(total, shares[member])
        for receiver in group.receivers(self._grid.plan):
            answer = self._grid.frame(
                "reduced", self._step, frame.target, receiver, part=frame.part
            )
            members = [member for member in group.members if member in self._by_slot]
            losses = tuple(loss for member in members for loss in self._by_slot[member])
            self._post(replace(answer, losses=losses), total)

    def is_complete(self, stage: int) -> bool:
        return len(self._reduced[stage]) == self._grid.groups[stage].num_parts

    def log(self, stage: int) -> BlobRef:
        if stage not in self._logged:
            shards = self._shards(stage)
            for shard in shards:
                self._grid.on_counted(stage, self._step, shard[history.HASH_BYTES :])
            self._logged[stage] = self._grid.logs[stage].write(self._step, shards)
        return self._logged[stage]

    def losses(self, stage: int) -> Losses:
        return self._losses if stage == self._grid.plan.num_stages - 1 else ()

    def sums_of_squares(self, stage: int) -> tuple[tuple[int, float], ...]:
        return ((stage, history.sum_of_squares(self._shards(stage)[0])),)

    def apply(self, scale: float) -> None:
        for stage in self._grid.stages:
            at = self._grid.states[stage]
            at.state = history.apply_update(at.state, b"".join(self._shards(stage)), scale)
            at.step += 1

    def state_hash(self, stage: int) -> str:
        return self._grid.states[stage].state.hex()

    def _shards(self, stage: int) -> Sequence[bytes]:
        reduced = self._reduced[stage]
        return [reduced[part] for part in sorted(reduced)]
