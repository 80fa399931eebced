"""Both ends of one boundary, for tests."""

from pathlib import Path

import torch
from torch import Tensor

from swarmnode.compression.delta import DeltaReceiver, DeltaSender
from swarmnode.compression.delta_cache import DeltaCache

SHAPE = (48, 64)
SLOT_VALUES = 48 * 64
SLOT_BYTES = 2 * SLOT_VALUES
SCOPE = b"generation 3, cut 1"


def pair(
    spec: str = "aq/int4/32", num_slots: int = 4, folder: Path | None = None
) -> tuple[DeltaSender, DeltaReceiver]:
    caches = [DeltaCache(num_slots * SLOT_BYTES, SLOT_VALUES, folder) for _ in range(2)]
    return DeltaSender(spec, SCOPE, caches[0]), DeltaReceiver(spec, SCOPE, caches[1])


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def visit(sender: DeltaSender, receiver: DeltaReceiver, key: bytes, hidden: Tensor) -> Tensor:
    """One sample in a step of its own, committed on both ends."""
    found = receiver.receive(sender.prepare(key, hidden))
    assert found.tensor is not None
    sender.commit()
    receiver.commit()
    return found.tensor
