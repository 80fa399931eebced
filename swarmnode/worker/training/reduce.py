"""Sums the gradients of a group's slots, shard by shard, in the same order whoever hosts them.

Every slot's share and every shard's sum pass through the codec once, also where they stay on
one machine: the result depends on the slots, never on their hosts.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from swarmnode.codec_specs import CodecSpec, for_size
from swarmnode.compression.codec import Codec, Payload, codec_of
from swarmnode.domain import SlotId
from swarmnode.errors import ShareError
from swarmnode.worker.training.blame import blaming
from swarmnode.worker.training.groups import Group, Parameter

MAX_NORM_RATIO = 1000.0
"""How many times a share's norm may be the median of the others'. Far more than noise makes of
it, and far less than a broken exponent: what comes again and again must not stop the run."""


@dataclass(frozen=True)
class ShardCodecs:
    """The codec of each shard in one step: what is small loses no more than bfloat16."""

    spec: CodecSpec
    step: int = 0

    def of(self, group: Group, part: int) -> Codec:
        start, stop = group.shard(part)
        return self.for_values(stop - start, is_small=group.is_small)

    def for_values(self, num_values: int, *, is_small: bool = False) -> Codec:
        form = for_size(self.spec, 0 if is_small else num_values)
        return codec_of(form).at(self.step)


class FlatGradient:
    """A group's gradient as one flat float32 tensor, with a view for each parameter."""

    def __init__(self, parameters: Iterable[Parameter], num_values: int, device: str) -> None:
        self.flat = torch.zeros(num_values, dtype=torch.float32, device=device)
        self.views: dict[str, Tensor] = {
            p.name: self.flat[p.start : p.stop].view(p.shape) for p in parameters
        }


def encode_shards(
    group: Group, slot: SlotId, flat: Tensor, encode: Callable[[int, Tensor], Payload]
) -> Iterator[tuple[int, Payload]]:
    """Yield (part, payload) of what one slot sends; `encode` gets the part and its values."""
    for part in group.parts_of(slot):
        start, stop = group.shard(part)
        yield part, encode(part, flat[start:stop])


class ShardSum:
    """The sum of one shard over all members, by its owner.

    Shares are added in member order as soon as they are next; early ones wait undecoded.
    """

    def __init__(self, group: Group, part: int, codecs: ShardCodecs, device: str) -> None:
        start, stop = group.shard(part)
        self._members = group.members
        self._codec = codecs.of(group, part)
        self._waiting: dict[SlotId, Payload] = {}
        self._norms: dict[SlotId, float] = {}
        self._device = device
        self._sum = torch.zeros(stop - start, dtype=torch.float32, device=device)

    def add(self, source: SlotId, payload: Payload) -> Tensor | None:
        """Take the share of `source`; return the sum once all members are in it.

        Raises: FrameError if a share does not decode, ShareError for an implausible one.
        """
        self._waiting[source] = payload
        while len(self._norms) < len(self._members):
            member = self._members[len(self._norms)]
            coded = self._waiting.pop(member, None)
            if coded is None:
                return None
            with blaming(member):
                share = self._codec.decode(coded, self._sum.shape, device=self._device)
            self._norms[member] = float(torch.linalg.vector_norm(share, dtype=torch.float64))
            self._sum += share
        check_norms(self._norms)
        return self._sum


def check_norms(norms: Mapping[SlotId, float]) -> None:
    """Refuse a share that is not finite, or so large that it would drown the others.

    Compared are slots of one stage: those of a tied head have other norms than the embedding's.
    Shares that are all zero say nothing: a slot need not have met any token of a shard. Where no
    share is finite, the run has diverged; that is for the coordinator to say.

    Raises: ShareError.
    """
    if not any(math.isfinite(norm) for norm in norms.values()):
        return
    for slot, norm in norms.items():
        if not math.isfinite(norm):
            raise ShareError(slot.stage, slot.slot, "is not finite", is_finite=False)
        others = [
            other
            for at, other in norms.items()
            if at != slot and at.stage == slot.stage and 0 < other < math.inf
        ]
        if others and norm > MAX_NORM_RATIO * median(others):
            reason = f"has norm {norm:.3g}, the median of the others is {median(others):.3g}"
            raise ShareError(slot.stage, slot.slot, reason)


class ReducedGradient:
    """A group's summed gradient as this node receives it, shard by shard.

    Of a gathered group it receives what each slot has, and adds it up in the order of the slots;
    what comes early waits undecoded.
    """

    def __init__(self, group: Group, codecs: ShardCodecs, flat: Tensor) -> None:
        self._group = group
        self._codecs = codecs
        self._flat = flat
        self._missing = set(range(group.num_parts))
        self._waiting: dict[int, Payload] = {}
        self.norms: dict[int, dict[SlotId, float]] = {}
        """Of a gathered group: by where a piece starts, the norm of each slot's part of it."""

    def take(self, part: int, payload: Payload) -> None:
        """Decode shard `part` in its place. Raises: FrameError if it does not decode."""
        if not self._group.is_gathered:
            self._put(part, payload)
            return
        self._waiting[part] = payload
        while self._missing and (next_part := min(self._missing)) in self._waiting:
            self._put(next_part, self._waiting.pop(next_part))

    def _put(self, part: int, payload: Payload) -> None:
        group, codec = self._group, self._codecs.of(self._group, part)
        owner, (start, stop) = group.owner(part), group.shard(part)
        values = place = self._flat[start:stop]
        with blaming(owner):
            if group.is_gathered and owner != group.members[0]:
                values = codec.decode(payload, place.shape, device=place.device)
                place += values
            else:
                codec.decode_into(payload, place)
        if group.is_gathered:
            norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
            self.norms.setdefault(start, {})[owner] = norm
        self._missing.discard(part)

    @property
    def is_complete(self) -> bool:
        return not self._missing
