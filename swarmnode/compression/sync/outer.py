"""Parameters that went their own way for some steps, and come together around a common anchor.

Shape letters: N values of the vector.
"""

import torch
from torch import Tensor

from swarmnode.compression.sync.averaging import Averager
from swarmnode.compression.sync.layout import Layout, Part
from swarmnode.compression.sync.messages import state_of
from swarmnode.compression.sync.sums import norm_of
from swarmnode.compression.tensors import Payload
from swarmnode.sync_specs import Outer, Sync


class OuterMomentum:
    """SGD on the anchor, with the mean difference as its gradient. Changes nothing until kept."""

    def __init__(self, outer: Outer, num_values: int, device: torch.device) -> None:
        self._outer = outer
        self.momentum_N = torch.zeros(num_values if outer.momentum else 0, device=device)

    def moves(self, mean: dict[Part, Tensor]) -> tuple[dict[Part, Tensor], dict[Part, Tensor]]:
        """(by how much to lower the anchor, the momentum to keep with it), by part."""
        outer = self._outer
        if not outer.momentum:
            return {part: outer.rate * each for part, each in mean.items()}, {}
        momentum = {
            part: outer.momentum * self.momentum_N[part.start : part.stop] + each
            for part, each in mean.items()
        }
        if outer.clip:
            top = outer.clip * norm_of(list(mean.values()))
            norm = norm_of(list(momentum.values()))
            if norm > top:
                momentum = {part: each * (top / norm) for part, each in momentum.items()}
        if not outer.is_nesterov:
            return {part: outer.rate * each for part, each in momentum.items()}, momentum
        moves = {
            part: outer.rate * (each + outer.momentum * momentum[part])
            for part, each in mean.items()
        }
        return moves, momentum

    def keep(self, momentum: dict[Part, Tensor]) -> None:
        for part, each in momentum.items():
            self.momentum_N[part.start : part.stop] = each


class DifferenceSync:
    """One slot's part in keeping a common anchor while all train on.

    A slot sends by how far its parameters went, anchor - theta; the anchor moves by the outer
    step of the mean, the same bits on every slot. Where anchors have drifted apart all the same,
    messages are refused. What theta becomes at the commit:
    - memory in the weights: theta + what was sent - the anchor's move. So what was not sent, and
      what was learned meanwhile, stays. Source: CocktailSGD's code.
    - blend b: b theta + (1 - b) anchor. Source: Streaming DiLoCo.
    - else the anchor; what was learned since `prepare` goes out with the next exchange, so nothing
      is lost where results come late. Source: DiLoCo; CO2.
    """

    def __init__(self, sync: Sync, layout: Layout, slot: int, theta_N: Tensor) -> None:
        self.averager = Averager(sync, layout, slot)
        self.anchor_N = theta_N.clone()
        self._outer = OuterMomentum(sync.outer, layout.num_values, theta_N.device)
        self._keeps_late = sync.staleness == 1 and sync.memory != "weights" and not sync.blend
        self._late_N = torch.zeros(
            layout.num_values if self._keeps_late else 0, device=theta_N.device
        )
        self._base: dict[Part, Tensor] = {}
        self._moves: dict[Part, Tensor] = {}
        self._momentum: dict[Part, Tensor] = {}

    def prepare(self, theta_N: Tensor) -> dict[int, bytes]:
        """What to send to whom. Raises: CodecError."""
        difference_N = torch.zeros_like(theta_N)
        for part in self.averager.parts:
            rows = slice(part.start, part.stop)
            torch.sub(self.anchor_N[rows], theta_N[rows], out=difference_N[rows])
            if self._keeps_late:
                difference_N[rows] += self._late_N[rows]
        anchor = state_of(self.anchor_N[p.start : p.stop] for p in self.averager.parts)
        messages = self.averager.prepare(difference_N, anchor)
        if self._keeps_late:
            self._base = {p: theta_N[p.start : p.stop].clone() for p in self.averager.parts}
        return messages

    def reduce(self, pushes: dict[int, Payload]) -> dict[int, bytes]:
        return self.averager.reduce(pushes)

    def receive(self, messages: dict[int, Payload]) -> None:
        """Raises: CodecError."""
        self._moves, self._momentum = self._outer.moves(self.averager.receive(messages))

    def commit(self, theta_N: Tensor) -> None:
        """Move the anchor, and theta with it."""
        sync, sent = self.averager.sync, self.averager.sent()
        for part, move in self._moves.items():
            rows = slice(part.start, part.stop)
            theta, anchor = theta_N[rows], self.anchor_N[rows]
            anchor.sub_(move)
            if sync.memory == "weights":
                theta.add_(sent[part]).sub_(move)
            elif sync.blend:
                theta.mul_(sync.blend).add_(anchor, alpha=1 - sync.blend)
            else:
                if self._keeps_late:
                    self._late_N[rows] = self._base[part].sub_(theta)
                theta.copy_(anchor)
        self._outer.keep(self._momentum)
        self.averager.commit()
        self._forget()

    def rollback(self) -> None:
        """Theta and the anchor stay; what was learned goes out with the next exchange."""
        self.averager.rollback()
        self._forget()

    def _forget(self) -> None:
        self._base, self._moves, self._momentum = {}, {}, {}
