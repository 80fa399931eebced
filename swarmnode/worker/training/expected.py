"""Which frames a peer may expect in one generation: everything else is refused, with a reason."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from swarmnode.domain import PeerId, Plan, SlotId
from swarmnode.messages import (
    Frame,
    FrameKind,
)
from swarmnode.worker.training.groups import Group

Boundary = Literal["activation", "activation_gradient"]
Role = Literal[Boundary, "held_out", "gradient", "small_gradient"]
"""`held_out`: a hidden state of an evaluation."""
Refusal = Literal["slot", "microbatch", "part", "shape", "length"]


class FrameKey(NamedTuple):
    """What makes a frame one of its step: a second one with the same key is a repetition."""

    kind: FrameKind
    source: SlotId
    target: SlotId
    microbatch: int
    group: int
    part: int


def frame_key(frame: Frame) -> FrameKey:
    return FrameKey(
        frame.kind, frame.source, frame.target, frame.microbatch, frame.group, frame.part
    )


@dataclass(frozen=True)
class ExpectedFrames:
    """Everything that a frame of one generation must agree with."""

    plan: Plan
    peer: PeerId
    hidden_shape: tuple[int, int, int]
    """Rows, positions, width of a boundary activation."""
    num_microbatches: int
    num_evaluation_microbatches: int
    """As many as there are, or on a node without the data the most that there can be."""
    groups: Mapping[int, Group]
    """The reduction groups of the stages that the peer holds, by index; empty where nothing
    trains."""
    fits: Callable[[Role, Frame, int], bool]
    """Whether a frame of a role, with the shape that it must have, can have so many bytes."""

    @property
    def most_bytes(self) -> int:
        """More than the frames of one slot that can be on their way to this peer at once.

        These are of two steps and of two evaluations: hidden states and their gradients, and of
        each group all shares and what they add up to. No coded tensor is twice as long as one
        of float32.
        """
        num_microbatches = 2 * self.num_microbatches + self.num_evaluation_microbatches
        num_shard_values = sum(2 * group.num_values for group in self.groups.values())
        return 2 * 2 * 4 * (num_microbatches * math.prod(self.hidden_shape) + num_shard_values)

    def refusal(self, frame: Frame, num_payload_bytes: int) -> Refusal | None:
        """Why the frame cannot be one of this generation, or None if it can."""
        if not self._is_hosted(frame.target):
            return "slot"
        role: Role
        if frame.kind in ("activation", "activation_gradient"):
            role = "held_out" if frame.evaluate else frame.kind
            wrong, shape = self._boundary(frame), tuple(self.hidden_shape)
        else:
            wrong, shape = self._reduction(frame)
            is_small = wrong is None and self.groups[frame.group].is_small
            role = "small_gradient" if is_small else "gradient"
        if wrong is not None:
            return wrong
        if frame.shape != shape:
            return "shape"
        return None if self.fits(role, frame, num_payload_bytes) else "length"

    def _is_hosted(self, slot: SlotId) -> bool:
        return slot in self.plan and self.plan.host(slot) == self.peer

    def _boundary(self, frame: Frame) -> Refusal | None:
        forward = frame.kind == "activation"
        stage, slot = frame.target
        source = SlotId(stage - 1 if forward else stage + 1, slot)
        if frame.source != source or not self.plan.computes(source):
            return "slot"
        count = self.num_evaluation_microbatches if frame.evaluate else self.num_microbatches
        if not forward and frame.evaluate:
            return "part"
        if frame.microbatch >= count or frame.microbatch % self.plan.num_slots != slot:
            return "microbatch"
        return None if (frame.group, frame.part) == (0, 0) else "part"

    def _reduction(self, frame: Frame) -> tuple[Refusal | None, tuple[int, ...]]:
        group = self.groups.get(frame.group)
        if group is None or frame.evaluate or frame.part >= group.num_parts:
            return "part", ()
        if frame.microbatch != 0:
            return "microbatch", ()
        owner = group.owner(frame.part)
        start, stop = group.shard(frame.part)
        if frame.kind == "gradient":
            is_share = frame.source in group.members and not group.is_gathered
            fits = frame.target == owner and is_share
        else:
            fits = frame.source == owner and frame.target == group.receiver(self.plan, self.peer)
        return None if fits else "slot", (stop - start,)
