"""All slots of a stage in one process: every message is really coded, opened and counted."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from swarmnode.compression.sync.slot import SyncedSlot
from swarmnode.compression.tensors import Payload

Messages = dict[int, dict[int, bytes]]
"""By sender, then by receiver."""


@dataclass
class Traffic:
    """Bytes of messages, headers of the exchange included, those of a transport not."""

    up_bytes: dict[int, int] = field(default_factory=dict)
    """By sender, once for each receiver."""
    down_bytes: dict[int, int] = field(default_factory=dict)
    num_exchanges: int = 0

    def count(self, messages: Messages) -> None:
        for sender, by_receiver in messages.items():
            for receiver, message in by_receiver.items():
                self.up_bytes[sender] = self.up_bytes.get(sender, 0) + len(message)
                self.down_bytes[receiver] = self.down_bytes.get(receiver, 0) + len(message)


def exchange(slots: Sequence[SyncedSlot], traffic: Traffic) -> None:
    """Prepare, deliver and receive; the commit is the caller's."""
    pushes = {slot.slot: slot.prepare() for slot in slots}
    traffic.count(pushes)
    replies = {slot.slot: slot.reduce(_for(slot, pushes)) for slot in slots}
    traffic.count(replies)
    has_owners = slots[0].sync.topology == "owners"
    for slot in slots:
        slot.receive(_for(slot, replies if has_owners else pushes))
    traffic.num_exchanges += 1


def step(
    slots: Sequence[SyncedSlot],
    gradients: Sequence[Tensor],
    rate: float,
    traffic: Traffic,
    *,
    is_last: bool = False,
) -> None:
    """One step of all: local ones, and an exchange where it is due or this is the last.

    The last step leaves nothing under way.
    """
    for slot, gradient_N in zip(slots, gradients, strict=True):
        slot.learn(gradient_N, rate)
    is_exchange = slots[0].is_due or is_last
    num_exchanges = slots[0].sync.fragments if is_last else 1
    for _ in range(num_exchanges if is_exchange else 0):
        _commit(slots, rate)
        exchange(slots, traffic)
        if not slots[0].sync.staleness:
            _commit(slots, rate)
    if is_last:
        _commit(slots, rate)


def _commit(slots: Sequence[SyncedSlot], rate: float) -> None:
    for slot in slots:
        if slot.is_exchanging:
            slot.commit(rate)


def _for(slot: SyncedSlot, messages: Messages) -> dict[int, Payload]:
    """What came to this slot, by sender."""
    return {
        sender: by_receiver[slot.slot]
        for sender, by_receiver in messages.items()
        if slot.slot in by_receiver
    }
