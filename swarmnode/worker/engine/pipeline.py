"""The microbatches of one step, through the slots that this node hosts.

Letters: B rows, S positions, D hidden width, V vocabulary.
"""

import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from swarmnode.compression.codec import Codec, Payload
from swarmnode.domain import SlotId
from swarmnode.errors import FrameError
from swarmnode.fields import FrameKind
from swarmnode.messages import Frame
from swarmnode.worker.engine.boundaries import BoundaryRole
from swarmnode.worker.engine.ports import Post
from swarmnode.worker.engine.setup import Setup
from swarmnode.worker.models import StageModule
from swarmnode.worker.training.blame import blaming
from swarmnode.worker.training.expected import Boundary
from swarmnode.worker.training.schedule import Direction, SlotSchedule, Work
from swarmnode.worker.training.slots import microbatches_of


@dataclass
class _Slot:
    """One hosted slot in this step."""

    schedule: SlotSchedule
    microbatches: tuple[int, ...]
    inputs: dict[tuple[Direction, int], Payload] = field(default_factory=dict)
    """What has arrived, still coded."""
    graphs: dict[int, tuple[Tensor | None, Tensor]] = field(default_factory=dict)
    """Per microbatch in flight: the input (none at the first stage), and the output."""
    losses: list[Tensor] = field(default_factory=list)


class Pipeline:
    """Runs 1F1B on every hosted slot; a unit of work is one microbatch, one way, in one slot."""

    def __init__(self, setup: Setup, step: int, post: Post, *, evaluate: bool) -> None:
        self._setup = setup
        self._step = step
        self._post = post
        self._evaluate = evaluate
        expected, plan = setup.expected, setup.plan
        count = expected.num_evaluation_microbatches if evaluate else expected.num_microbatches
        self._local = None if evaluate else setup.local
        self._slots: dict[SlotId, _Slot] = {}
        for slot in sorted(setup.hosted, reverse=True):  # late stages first: they free memory
            microbatches = microbatches_of(
                slot.slot, num_slots=plan.num_slots, num_microbatches=count
            )
            schedule = SlotSchedule(
                stage=slot.stage,
                num_stages=plan.num_stages,
                microbatches=microbatches,
                forward_only=evaluate,
                flush_every=len(microbatches) // self._local.num_steps if self._local else None,
                ahead=setup.manifest.run.ahead,
            )
            self._slots[slot] = _Slot(schedule, microbatches)
        if not evaluate:
            for gradients in setup.accumulators.values():
                for gradient in gradients.values():
                    gradient.flat.zero_()
        if self._local is not None:
            for slot in setup.hosted:
                self._local.start(slot, step)

    def take(self, frame: Frame, payload: Payload) -> None:
        """Keep a boundary tensor, still coded, until its work is next."""
        slot = self._slots[frame.target]
        direction: Direction = "forward" if frame.kind == "activation" else "backward"
        slot.inputs[direction, frame.microbatch] = payload
        if self._travels_as_change(frame.kind):
            assert self._setup.deltas is not None
            self._setup.deltas.arrived(frame.target, payload)
        slot.schedule.arrived(direction, frame.microbatch)

    def work(self) -> SlotId | None:
        """Do one unit; the slot that did it, or None if all wait or are done."""
        ready = [(slot, at.schedule.next()) for slot, at in self._slots.items()]
        for direction in ("backward", "forward"):
            for slot, work in ready:
                if work is not None and work.direction == direction:
                    self._perform(slot, work)
                    self._slots[slot].schedule.done(work)
                    if work.direction == "backward":
                        self._step_alone(slot)
                    return slot
        return None

    def is_finished(self, slot: SlotId) -> bool:
        return self._slots[slot].schedule.is_finished

    def microbatches(self, slot: SlotId) -> tuple[int, ...]:
        return self._slots[slot].microbatches

    def losses(self, slot: SlotId) -> tuple[float, ...]:
        """The mean loss of each microbatch in order, nats per token; none but at the last stage."""
        return tuple(float(loss) for loss in self._slots[slot].losses)

    def _perform(self, slot: SlotId, work: Work) -> None:
        began_s = time.monotonic()
        self._prefetch(slot, work)
        if work.direction == "backward":
            self._backward(slot, work.microbatch)
        else:
            self._forward(slot, work.microbatch)
        self._setup.on_span(
            work.direction, began_s, time.monotonic(), step=self._step, evaluate=self._evaluate,
            slot=tuple(slot), microbatch=work.microbatch,
        )  # fmt: skip

    def _prefetch(self, slot: SlotId, work: Work) -> None:
        """What the forward after this work sends as a change is read from the disk meanwhile."""
        following = self._slots[slot].schedule.forward_after(work)
        if following is None or self._setup.is_last(slot):
            return
        if self._travels_as_change("activation"):
            assert self._setup.deltas is not None
            self._setup.deltas.prefetch(slot, self._step, following)

    def _forward(self, slot: SlotId, microbatch: int) -> None:
        setup, at = self._setup, self._slots[slot]
        inputs = self._inputs(slot, microbatch)
        with torch.set_grad_enabled(not self._evaluate), setup.autocast():
            output = self._module(slot)(inputs)
        if setup.is_last(slot):
            labels_BS = self._tokens(microbatch)[:, 1:]
            output = F.cross_entropy(output.float().flatten(0, 1), labels_BS.flatten())
            at.losses.append(output.detach())
        else:
            target = SlotId(slot.stage + 1, slot.slot)
            self._send("activation", slot, target, microbatch, output)
        if not self._evaluate:
            at.graphs[microbatch] = (None if slot.stage == 0 else inputs, output)

    def _inputs(self, slot: SlotId, microbatch: int) -> Tensor:
        if slot.stage == 0:
            return self._tokens(microbatch)[:, :-1]
        payload = self._slots[slot].inputs.pop(("forward", microbatch))
        hidden_BSD = self._decode("activation", slot, payload)
        return hidden_BSD.requires_grad_(not self._evaluate)

    def _backward(self, slot: SlotId, microbatch: int) -> None:
        setup, at = self._setup, self._slots[slot]
        inputs, output = at.graphs.pop(microbatch)
        if setup.is_last(slot):
            count = setup.expected.num_microbatches
            if self._local is not None:  # the mean over the slot's own, of one local step
                count = len(at.microbatches) // self._local.num_steps
            gradient = torch.full_like(output, 1.0 / count)
        else:
            payload = at.inputs.pop(("backward", microbatch))
            gradient = self._decode("activation_gradient", slot, payload).to(output.dtype)
        self._point_gradients_at(slot)
        torch.autograd.backward(output, gradient)
        if inputs is not None:
            assert inputs.grad is not None
            target = SlotId(slot.stage - 1, slot.slot)
            self._send("activation_gradient", slot, target, microbatch, inputs.grad)

    def _point_gradients_at(self, slot: SlotId) -> None:
        """Let autograd add into the slot's own accumulator: the slots of a stage share weights."""
        views = {
            name: view
            for gradient in self._setup.accumulators[slot].values()
            for name, view in gradient.views.items()
        }
        for name, parameter in self._module(slot).parameters_by_name().items():
            parameter.grad = views[name]

    def _step_alone(self, slot: SlotId) -> None:
        """With local steps: take one where its last microbatch is done, and end the round."""
        local, schedule = self._local, self._slots[slot].schedule
        if local is None or not schedule.is_flushed:
            return
        gradients = self._setup.accumulators[slot].values()
        local.step(slot, gradients)
        if schedule.is_finished:
            local.difference(slot, gradients)

    def _module(self, slot: SlotId) -> StageModule:
        if self._local is not None:
            return self._local.module(slot)
        return self._setup.stages[slot.stage].module

    def _tokens(self, microbatch: int) -> Tensor:
        batches = self._setup.batches
        assert batches is not None
        rows = (
            batches.validation(microbatch)
            if self._evaluate
            else batches.training(self._step, microbatch)
        )
        return torch.from_numpy(rows).to(self._setup.device)

    def _decode(self, kind: Boundary, target: SlotId, payload: Payload) -> Tensor:
        step_back = -1 if kind == "activation" else 1
        source = SlotId(target.stage + step_back, target.slot)
        with blaming(source):
            values_BSD = self._decoded(kind, source, target, payload)
        if not values_BSD.isfinite().all():
            raise FrameError(source.stage, source.slot, "a value is not finite", is_finite=False)
        return values_BSD

    def _decoded(self, kind: Boundary, source: SlotId, target: SlotId, payload: Payload) -> Tensor:
        setup = self._setup
        if self._travels_as_change(kind):
            deltas = setup.deltas
            assert deltas is not None
            return setup.meter.decode_rows(
                kind, deltas.codecs(payload), lambda: deltas.decode(target, payload, setup.device)
            )
        codec, shape = self._codec(kind, source, target), setup.expected.hidden_shape
        return setup.meter.decode(
            kind, codec.spec, lambda: codec.decode(payload, shape, device=setup.device)
        )

    def _send(
        self, kind: Boundary, source: SlotId, target: SlotId, microbatch: int, tensor: Tensor
    ) -> None:
        setup, step = self._setup, self._step
        frame = setup.frame(
            kind, step, source, target, setup.expected.hidden_shape,
            microbatch=microbatch, evaluate=self._evaluate,
        )  # fmt: skip
        values = tensor.detach().float()
        if self._travels_as_change(kind):
            deltas = setup.deltas
            assert deltas is not None
            payload: Payload = setup.meter.encode_rows(
                kind, values, lambda: deltas.encode(source, step, microbatch, values), deltas.codec,
                lambda row: deltas.error(source, step, microbatch, row, values[row]),
            )  # fmt: skip
        else:
            codec = self._codec(kind, source, target)
            payload = setup.meter.encode(
                kind, codec.spec, values, lambda: codec.encode(values),
                lambda coded: values - codec.decode(coded, values.shape, device=values.device),
            )  # fmt: skip
        self._post(frame, payload)

    def _codec(self, kind: Boundary, source: SlotId, target: SlotId) -> Codec:
        role: BoundaryRole = "held_out" if self._evaluate else kind
        return self._setup.boundaries.codec(role, source, target).at(self._step)

    def _travels_as_change(self, kind: FrameKind) -> bool:
        """Held out samples have no history; nor have gradients."""
        return self._setup.deltas is not None and kind == "activation" and not self._evaluate
