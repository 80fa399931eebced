"""Splits of layers into contiguous stages: the least maximum, exactly, under memory caps.

All layers are alike, so a split is the number of layers of each stage, at least one each. For a
limit on the slowest stage, each stage can take so many layers and no more; the least limit that
lets all layers find a place is one of the S * L times that a stage can take.
"""

from collections.abc import Sequence

import numpy as np

from swarmnode.coordinator.cost.step_formula import Floats, Ints


def most_layers(limit_s: float, layer_s: Floats, fixed_s: Floats, caps: Ints) -> Ints:
    """How many layers each stage may have so that none takes longer than `limit_s`."""
    spare = np.maximum(0.0, (limit_s - fixed_s) / layer_s + 1e-9)
    return np.minimum(caps, np.floor(np.minimum(spare, 1e9))).astype(np.int64)


def limits_of(num_layers: int, layer_s: Floats, fixed_s: Floats) -> Floats:
    """Every time that a stage can take, (at most S * L,), ascending."""
    counts = np.arange(1, num_layers + 1)
    return np.unique(fixed_s[:, None] + layer_s[:, None] * counts)


def min_max_split(
    num_layers: int, layer_s: Sequence[float], fixed_s: Sequence[float], caps: Sequence[int]
) -> tuple[int, ...] | None:
    """The split whose slowest stage is fastest, and among those the one with the least sum.

    Stage s with n layers takes fixed_s[s] + n * layer_s[s]; it has 1 to caps[s] layers.
    Returns None if the caps leave no room for all layers.
    """
    layer, fixed = np.asarray(layer_s, dtype=float), np.asarray(fixed_s, dtype=float)
    cap = np.asarray(caps, dtype=np.int64)
    if (cap < 1).any() or cap.sum() < num_layers or len(cap) > num_layers:
        return None
    limits = limits_of(num_layers, layer, fixed)
    low, high = 0, len(limits) - 1
    while low < high:
        middle = (low + high) // 2
        most = most_layers(limits[middle], layer, fixed, cap)
        if (most >= 1).all() and most.sum() >= num_layers:
            high = middle
        else:
            low = middle + 1
    return cheapest_split(num_layers, layer, most_layers(limits[low], layer, fixed, cap))


def cheapest_split(num_layers: int, layer_s: Floats, most: Ints) -> tuple[int, ...] | None:
    """One layer each, the rest where a layer is cheapest, up to `most` (S,); None if too few."""
    if (most < 1).any() or most.sum() < num_layers or len(most) > num_layers:
        return None
    counts = np.ones(len(most), dtype=np.int64)
    left = num_layers - len(most)
    for s in np.argsort(layer_s, kind="stable"):
        more = min(left, int(most[s]) - 1)
        counts[s] += more
        left -= more
    return tuple(int(count) for count in counts)
