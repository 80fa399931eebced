"""Sums the gradients of a group's slots, shard by shard, in the same order whoever hosts them.

Every slot's share and every shard's sum pass through the codec once, also where they stay on
one machine: the result depends on the slots, never on their hosts.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from swarmnode.compression.codec import Codec, Payload
from swarmnode.domain import SlotId
from swarmnode.worker.training.groups import Group, Parameter


class FlatGradient:
    """A group's gradient as one flat float32 tensor, with a view for each parameter."""

    def __init__(self, parameters: Iterable[Parameter], num_values: int, device: str) -> None:
        self.flat = torch.zeros(num_values, dtype=torch.float32, device=device)
        self.views: dict[str, Tensor] = {
            p.name: self.flat[p.start : p.stop].view(p.shape) for p in parameters
        }


def encode_shards(group: Group, codec: Codec, flat: Tensor) -> Iterator[tuple[int, Payload]]:
    """Yield (part, payload) of one slot's share of every shard."""
    for part in range(group.num_parts):
        start, stop = group.shard(part)
        yield part, codec.encode(flat[start:stop])


class ShardSum:
    """The sum of one shard over all members, by its owner.

    Shares are added in member order as soon as they are next; early ones wait undecoded.
    """

    def __init__(self, group: Group, part: int, codec: Codec, device: str) -> None:
        start, stop = group.shard(part)
        self._members = group.members
        self._codec = codec
        self._waiting: dict[SlotId, Payload] = {}
        self._num_added = 0
        self._device = device
        self._sum = torch.zeros(stop - start, dtype=torch.float32, device=device)

    def add(self, source: SlotId, payload: Payload) -> Payload | None:
        """Take the share of `source`; return the coded sum once all members are in it.

        Raises: CodecError if a share does not decode or the sum cannot be coded.
        """
        self._waiting[source] = payload
        while self._num_added < len(self._members):
            share = self._waiting.pop(self._members[self._num_added], None)
            if share is None:
                return None
            self._sum += self._codec.decode(share, self._sum.shape, device=self._device)
            self._num_added += 1
        return self._codec.encode(self._sum)


class ReducedGradient:
    """A group's summed gradient as this node receives it, shard by shard."""

    def __init__(self, group: Group, codec: Codec, flat: Tensor) -> None:
        self._group = group
        self._codec = codec
        self._flat = flat
        self._missing = set(range(group.num_parts))

    def take(self, part: int, payload: Payload) -> None:
        """Decode shard `part` in its place. Raises: CodecError if it does not decode."""
        start, stop = self._group.shard(part)
        decoded = self._codec.decode(payload, (stop - start,), device=str(self._flat.device))
        self._flat[start:stop] = decoded
        self._missing.discard(part)

    @property
    def is_complete(self) -> bool:
        return not self._missing
