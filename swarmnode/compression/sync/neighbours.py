"""Averaging with the neighbours in a ring: nothing is common to all, and all come closer.

Source: Bagua (arXiv 2107.01499), decentralised algorithms, full and low precision.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from swarmnode.compression.sync.layout import Layout, Part
from swarmnode.compression.sync.messages import Envelope, state_of
from swarmnode.compression.sync.sums import norm_of, rejected_slots
from swarmnode.compression.tensors import Payload
from swarmnode.errors import CodecError
from swarmnode.sync_specs import Sync


def neighbours_of(slot: int, num_slots: int) -> list[int]:
    """The slots beside this one in the ring, in order."""
    return sorted({(slot - 1) % num_slots, (slot + 1) % num_slots} - {slot})


class NeighbourSync:
    """One slot among its neighbours: theta becomes the mean of theirs and its own.

    Without a memory the parameters travel. With a mirror each slot keeps w, what its neighbours
    know of it, and theirs; it sends q = Q(theta + sum of (theirs - w) / (neighbours + 1) - w),
    all add q to their copies of w, and theta = w. Copies are equal bit for bit as long as every
    slot commits the same exchanges (separate additions in float32, no product with a sum), and a
    message whose mirror is not is refused.

    Neighbours whose parameters (or mirror) are not finite, or whose norm is over ten medians, are
    left out of the mean, and their mirror follows all the same.
    """

    def __init__(self, sync: Sync, layout: Layout, slot: int, theta_N: Tensor) -> None:
        self._sync, self._layout, self._slot = sync, layout, slot
        self.neighbours = neighbours_of(slot, layout.num_slots)
        self.num_exchanges = 0
        self.num_rejected = 0
        self.mirrors: dict[int, Tensor] = {}
        if sync.memory == "mirror":
            self.mirrors = {each: theta_N.clone() for each in (slot, *self.neighbours)}
        self._open: Envelope | None = None
        self._own_N = theta_N
        self._result_N: Tensor | None = None
        self._next_mirrors: dict[int, Tensor] = {}
        self._num_rejected_now = 0

    def prepare(self, theta_N: Tensor) -> dict[int, bytes]:
        """What to send to whom. Raises: CodecError."""
        assert self._open is None, "one exchange at a time"
        envelope = Envelope(self._sync, self._layout, self.num_exchanges)
        value_N, self._num_rejected_now = theta_N.clone(), 0
        if self.mirrors:
            value_N = self._mixed(theta_N, self.mirrors, self.mirrors[self._slot])
            value_N.sub_(self.mirrors[self._slot])
        bodies = [envelope.encode(part, value_N[part.start : part.stop]) for part in self._parts]
        self._own_N = torch.empty_like(theta_N)
        for part, body in zip(self._parts, bodies, strict=True):
            self._own_N[part.start : part.stop] = envelope.decode(part, body, theta_N.device)
        if not self.mirrors:
            self._own_N = value_N  # no need to lose anything of the own ones
        self._open = envelope
        message = self._envelope_of(self._slot).seal(self._slot, bodies)
        return dict.fromkeys(self.neighbours, message)

    @property
    def _parts(self) -> list[Part]:
        return self._layout.parts_of(0)

    def _envelope_of(self, sender: int) -> Envelope:
        """Messages change what their sender's mirror was: one that has drifted refuses them."""
        assert self._open is not None
        mirrors = [self.mirrors[sender]] if self.mirrors else []
        return replace(self._open, state=state_of(mirrors))

    def _mixed(self, theta_N: Tensor, others: Mapping[int, Tensor], own_N: Tensor) -> Tensor:
        """theta + sum of (other - own) / (neighbours + 1), over those who are accepted."""
        norms = {slot: norm_of([others[slot]]) for slot in self.neighbours}
        rejected = rejected_slots({**norms, self._slot: norm_of([own_N])})
        self._num_rejected_now += len(rejected)
        share, mixed_N = 1 / (len(self.neighbours) + 1), theta_N.clone()
        for slot in self.neighbours:
            if slot not in rejected:
                mixed_N.add_(others[slot].sub(own_N).mul_(share))
        return mixed_N

    def reduce(self, pushes: Mapping[int, Payload]) -> dict[int, bytes]:
        """Nobody sums for others."""
        del pushes
        return {}

    def receive(self, messages: Mapping[int, Payload]) -> None:
        """Raises: CodecError unless it is one message of each neighbour, as it must be."""
        assert self._open is not None
        if sorted(messages) != self.neighbours:
            raise CodecError(f"messages of slots {sorted(messages)} instead of {self.neighbours}")
        received = {self._slot: self._own_N}
        for slot, message in sorted(messages.items()):
            envelope = self._envelope_of(slot)
            values = envelope.open(slot, message, self._parts, self._own_N.device)
            received[slot] = torch.cat([values[part] for part in self._parts])
        if not self.mirrors:
            self._result_N = self._mixed(self._own_N, received, self._own_N)
            return
        self._next_mirrors = {slot: self.mirrors[slot] + each for slot, each in received.items()}
        self._result_N = self._next_mirrors[self._slot]

    def commit(self, theta_N: Tensor) -> None:
        """Set theta to the mean."""
        assert self._result_N is not None
        theta_N.copy_(self._result_N)
        self.mirrors = self._next_mirrors
        self.num_exchanges += 1
        self.num_rejected += self._num_rejected_now
        self._forget()

    def rollback(self) -> None:
        """Theta and all mirrors stay, bit for bit."""
        assert self._open is not None, "no exchange under way"
        self._forget()

    def _forget(self) -> None:
        self._open, self._result_N, self._next_mirrors = None, None, {}
