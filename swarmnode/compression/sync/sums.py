"""What others contribute is looked at before it is summed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median_low

import torch
from torch import Tensor

NORM_LIMIT = 10.0
"""A contribution whose norm is over so many medians is left out."""


@dataclass(frozen=True, eq=False)
class Mean:
    """The mean of what was accepted, and the slots whose contribution was not."""

    values: Tensor
    rejected: tuple[int, ...]


def rejected_slots(norms: Mapping[int, float], limit: float = NORM_LIMIT) -> tuple[int, ...]:
    """Slots whose norm is not finite or over `limit` medians, in order.

    The median (the lower of two) is that of the norms that are finite and not zero: where almost
    everybody has nothing to say, nothing can be said about the others. It holds against fewer
    than half of them.
    """
    known = [norm for norm in norms.values() if math.isfinite(norm) and norm > 0]
    top = limit * median_low(known) if known else 0.0
    return tuple(slot for slot in sorted(norms) if not norms[slot] <= top)


def norm_of(parts: list[Tensor]) -> float:
    """The norm of all parts together; infinite or not a number where a value is, or over 1e19."""
    return math.hypot(*(float(torch.linalg.vector_norm(part)) for part in parts))


def checked_mean(contributions: Mapping[int, list[Tensor]], limit: float = NORM_LIMIT) -> Mean:
    """The mean of what is accepted, summed in the order of the slots, value by value.

    A slot is accepted or left out as a whole, all its parts. Who has the same contributions has
    the same bits, norms at the edge of the limit aside (owners judge their shard alone). With
    nothing to accept the mean is 0.
    """
    norms = {slot: norm_of(parts) for slot, parts in contributions.items()}
    rejected = rejected_slots(norms, limit)
    accepted = [slot for slot in sorted(contributions) if slot not in rejected]
    first = torch.cat(next(iter(contributions.values())))
    total = torch.zeros_like(first)
    for slot in accepted:
        total.add_(torch.cat(contributions[slot]))
    return Mean(total.div_(max(1, len(accepted))), rejected)
