"""One slot of a stage that trains with a `Sync`: local steps, and exchanges in two phases.

    slot.learn(gradient, rate)
    if slot.is_due:
        if slot.is_exchanging: slot.commit(rate)                        # staleness 1: the last one
        pushes = slot.prepare();  replies = slot.reduce(pushes of the others)
        slot.receive(replies, or the others' pushes)
        if not sync.staleness: slot.commit(rate)                        # or slot.rollback()

The caller moves bytes and decides who is in; nothing here waits. `loopback` does it in one process.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from swarmnode.compression.sync.averaging import Averager
from swarmnode.compression.sync.inner import InnerAdamW
from swarmnode.compression.sync.layout import Layout, Part
from swarmnode.compression.sync.neighbours import NeighbourSync
from swarmnode.compression.sync.outer import DifferenceSync
from swarmnode.compression.tensors import Payload
from swarmnode.sync_specs import Sync


class GradientSync:
    """Averages gradients, or Adam's momentum after the warm-up; the optimizer steps at commit."""

    def __init__(self, sync: Sync, layout: Layout, slot: int, inner: InnerAdamW) -> None:
        self.averager = Averager(sync, layout, slot)
        self._inner = inner
        self._mean: dict[Part, Tensor] = {}

    @property
    def _sends_momentum(self) -> bool:
        sync = self.averager.sync
        return sync.sends == "momentum" and self.averager.num_exchanges >= sync.warmup

    def prepare(self, gradient_N: Tensor) -> dict[int, bytes]:
        if self._sends_momentum:
            gradient_N = self._inner.momentum_with(gradient_N)
        return self.averager.prepare(gradient_N)

    def reduce(self, pushes: Mapping[int, Payload]) -> dict[int, bytes]:
        return self.averager.reduce(pushes)

    def receive(self, messages: Mapping[int, Payload]) -> None:
        self._mean = self.averager.receive(messages)

    def commit(self, theta_N: Tensor, rate: float) -> None:
        mean_N = torch.empty_like(theta_N)
        for part, each in self._mean.items():
            mean_N[part.start : part.stop] = each
        step = self._inner.step_with if self._sends_momentum else self._inner.step
        step(theta_N, mean_N, rate)
        self.averager.commit()

    def rollback(self) -> None:
        self.averager.rollback()


class SyncedSlot:
    """Parameters, optimizer and exchange of one slot."""

    def __init__(
        self, sync: Sync, layout: Layout, slot: int, theta_N: Tensor, inner: InnerAdamW
    ) -> None:
        self.sync, self.layout, self.slot, self.inner = sync, layout, slot, inner
        self.theta_N = theta_N
        """Written to in place, so that a model's parameters may be views of it."""
        self.num_steps = 0
        self.is_exchanging = False
        self._gradient_N: Tensor | None = None
        self.exchange: GradientSync | DifferenceSync | NeighbourSync
        if sync.sends == "weights":
            self.exchange = NeighbourSync(sync, layout, slot, theta_N)
        elif sync.sends == "difference":
            self.exchange = DifferenceSync(sync, layout, slot, theta_N)
        else:
            self.exchange = GradientSync(sync, layout, slot, inner)

    @property
    def common(self) -> Tensor:
        """What all slots have alike: the anchor where there is one, else the parameters."""
        is_anchored = isinstance(self.exchange, DifferenceSync)
        return self.exchange.anchor_N if is_anchored else self.theta_N  # type: ignore[union-attr]

    @property
    def num_rejected(self) -> int:
        """Contributions of others (or its own) that this slot has left out."""
        if isinstance(self.exchange, NeighbourSync):
            return self.exchange.num_rejected
        return self.exchange.averager.num_rejected

    @property
    def is_due(self) -> bool:
        """Whether an exchange begins after this step."""
        return self.num_steps > 0 and self.num_steps % self.sync.gap == 0

    def learn(self, gradient_N: Tensor, rate: float) -> None:
        """A local step; where gradients are averaged, keeps this one for the exchange."""
        self.num_steps += 1
        if isinstance(self.exchange, GradientSync):
            self._gradient_N = gradient_N
        else:
            self.inner.step(self.theta_N, gradient_N, rate)

    def prepare(self) -> dict[int, bytes]:
        """What to send to whom. Raises: CodecError; then nothing is under way."""
        if isinstance(self.exchange, GradientSync):
            assert self._gradient_N is not None, "learn first"
            messages = self.exchange.prepare(self._gradient_N)
        else:
            messages = self.exchange.prepare(self.theta_N)
        self.is_exchanging = True
        return messages

    def reduce(self, pushes: dict[int, Payload]) -> dict[int, bytes]:
        """Replies of an owner, by slot. Raises: CodecError."""
        return self.exchange.reduce(pushes)

    def receive(self, messages: dict[int, Payload]) -> None:
        """The owners' replies, or without owners all pushes. Raises: CodecError."""
        self.exchange.receive(messages)

    def commit(self, rate: float) -> None:
        """The exchange has happened, for everybody. Changes theta."""
        if isinstance(self.exchange, GradientSync):
            self.exchange.commit(self.theta_N, rate)
        else:
            self.exchange.commit(self.theta_N)
        self.is_exchanging = False

    def rollback(self) -> None:
        """The exchange has not happened. Local steps stay; a gradient must be learned again."""
        self.exchange.rollback()
        self.is_exchanging = False
        if isinstance(self.exchange, GradientSync):
            self.num_steps -= 1
