"""Reduction groups: whose gradients are summed with whose, and which slot sums which shard.

Group s is all slots of stage s over the stage's own parameters. Where input and output
embeddings are tied and lie in different stages, group S is all slots of stage 0, then all of
stage S-1, over the tied parameter alone, which groups 0 and S-1 then leave out. Where gradients
are coded coarsely, group S+1+s has the small parameters of stage s: norms and biases, a small
share of the bytes and a large one of the damage.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from swarmnode.domain import PeerId, Plan, SlotId

MAX_SHARD_VALUES = 1 << 24
"""Most values in one shard: 64 MiB uncoded, well below the largest message."""


@dataclass(frozen=True)
class Parameter:
    """Where a parameter lies in its group's flat gradient."""

    name: str
    """The name in the stage at hand; a tied head has another one than its embedding."""
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)


@dataclass(frozen=True)
class Group:
    """Slots whose gradients are summed, shard by shard.

    The flat gradient has one near-equal shard for each member, or some multiple of that where
    shards would be too large for a message; shard i is owned by members[i % len(members)]. Where
    it is gathered, nobody sums for others: part i is what members[i % len(members)] has of the
    whole, or of a near-equal piece of it; the parts of a piece follow each other.
    """

    index: int
    members: tuple[SlotId, ...]
    num_values: int
    is_small: bool = False
    """Whether it is made of small parameters, which bear no coarse codec."""
    is_gathered: bool = False
    """Whether each member sends all that it has to everybody, who sum alike."""

    @property
    def num_parts(self) -> int:
        count = len(self.members)
        if self.is_gathered:
            return count * self._num_pieces
        return count * max(1, -(-self.num_values // (count * MAX_SHARD_VALUES)))

    @property
    def _num_pieces(self) -> int:
        return max(1, -(-self.num_values // MAX_SHARD_VALUES))

    def owner(self, part: int) -> SlotId:
        """Who sums shard `part`; or whose it is."""
        return self.members[part % len(self.members)]

    def parts_of(self, slot: SlotId) -> range:
        """What a member codes: its share of every shard; or its own parts."""
        if self.is_gathered:
            return range(self.members.index(slot), self.num_parts, len(self.members))
        return range(self.num_parts)

    def shard(self, part: int) -> tuple[int, int]:
        """The half-open range of shard `part`; sizes differ by at most one."""
        count = self.num_parts
        if self.is_gathered:
            part, count = part // len(self.members), self._num_pieces
        return self.num_values * part // count, self.num_values * (part + 1) // count

    def receiver(self, plan: Plan, peer: PeerId) -> SlotId | None:
        """The slot that reduced shards for `peer` are addressed to: the lowest that it hosts or
        shadows in a stage of the group."""
        return min((slot for slot in self._held(plan) if plan.host(slot) == peer), default=None)

    def receivers(self, plan: Plan) -> tuple[SlotId, ...]:
        """One slot or shadow for each peer that holds a stage of the group, in slot order."""
        lowest: dict[PeerId, SlotId] = {}
        for slot in self._held(plan):
            lowest.setdefault(plan.host(slot), slot)
        return tuple(lowest.values())

    def _held(self, plan: Plan) -> list[SlotId]:
        """All slots and shadows of the members' stages, sorted."""
        stages = sorted({slot.stage for slot in self.members})
        return [SlotId(s, number) for s in stages for number in range(len(plan.holders(s)))]


@dataclass(frozen=True)
class StageGroups:
    """The groups of one stage, in group order, with the stage's parameters in each."""

    groups: tuple[tuple[Group, tuple[Parameter, ...]], ...]

    @property
    def indices(self) -> tuple[int, ...]:
        return tuple(group.index for group, _ in self.groups)


def stage_groups(
    *,
    stage: int,
    num_stages: int,
    num_slots: int,
    shapes: Mapping[str, Sequence[int]],
    tied: Mapping[str, str],
    small_values: int = 0,
    is_gathered: bool = False,
) -> StageGroups:
    """The groups of `stage`, whose parameters have `shapes` by canonical name.

    `tied` maps the head's copy to the embedding that it equals; it is empty where they are one
    parameter. Parameters lie in sorted order of their names, each group starting at 0. Those of
    fewer than `small_values` values have a group of their own.
    """
    ends = (0, num_stages - 1)
    shared = set(tied) | set(tied.values()) if num_stages > 1 and stage in ends else set()
    small = {n for n in shapes if n not in shared and math.prod(shapes[n]) < small_values}
    own = _layout({name: shapes[name] for name in shapes if name not in shared | small})
    members = tuple(SlotId(stage, slot) for slot in range(num_slots))
    found = [(Group(stage, members, _num_values(own)), own)]
    both = _layout({name: shapes[name] for name in shapes if name in shared})
    if both:
        members = tuple(SlotId(end, slot) for end in ends for slot in range(num_slots))
        found.append((Group(num_stages, members, _num_values(both)), both))
    rest = _layout({name: shapes[name] for name in small})
    if rest:
        members, index = found[0][0].members, num_stages + 1 + stage
        found.append((Group(index, members, _num_values(rest), is_small=True), rest))
    return StageGroups(tuple((replace(g, is_gathered=is_gathered), own) for g, own in found))


def _layout(shapes: Mapping[str, Sequence[int]]) -> tuple[Parameter, ...]:
    parameters: list[Parameter] = []
    for name in sorted(shapes):
        start = parameters[-1].stop if parameters else 0
        parameters.append(Parameter(name, tuple(shapes[name]), start))
    return tuple(parameters)


def _num_values(parameters: tuple[Parameter, ...]) -> int:
    return parameters[-1].stop if parameters else 0
