"""What no arrangement of the grid can beat, for any number of nodes.

The argument. Call a hop cheap at a level if its dearest pair costs less than that. Cheap hops
that follow one another make a segment of m stages, and each of its V columns stays within one
component of the graph of cheap pairs. A component of c nodes has room for c // m such columns, so
each stage of the segment has at most c // m nodes of it: long cheap segments scatter the stages,
and a scattered stage reduces slowly. So a limit on the reduction limits, node by node, how long a
segment it can be in, and thereby how many hops are cheap at each level. The sum of the hops is the
integral, over the level, of how many are not cheap. Trying all limits gives the bound.

Letters: N nodes, S stages, T levels, D limits of the reduction.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from swarmnode.coordinator.objective import Bound
from swarmnode.coordinator.solver.compiled import compiled

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MAX_LEVELS = 512
FEWEST_LEVELS = 64
LEVELS_TIMES_NODES = 131_072
"""A large swarm gets fewer levels: a weaker bound in seconds instead of a good one in minutes."""
NUM_LIMITS = 512
SAFETY = 1e-9
"""By what share the bound is lowered, against the rounding of its own sums."""


def grid_bound(reduce_s: Floats, hop_s: Floats, num_stages: int, num_slots: int) -> Bound:
    """A proven lower bound of the dearest node's reduction plus the sum of the hops.

    Shapes: (N, N), inf for no link, hop_s symmetric; N >= S * V, a node has one slot at most.
    Bound: inf if the argument proves that no grid avoids the missing links.
    """
    grid = (num_stages, num_slots)
    rows = _sorted_rows(reduce_s)
    every = _levels(hop_s)
    tables = [_needs(*rows, hop_s, every[-1:], *grid)]
    alone = np.sort(tables[0][0, :, 0])[num_stages * num_slots - 1]
    if not np.isfinite(alone) or _hops_s(tables[0], every[-1:], np.inf, *grid) > 0:
        return Bound(float("inf"), "the links that are there do not hold the grid together")
    coarse = every[:: max(1, len(every) // 64)]
    needs = _needs(*rows, hop_s, coarse, *grid)
    open_at = [_num_dear(table, float(alone), *grid) > 0 for table in needs]
    last = coarse[min(sum(open_at), len(coarse) - 1)]
    below = every[every <= last]
    most = min(MAX_LEVELS, max(FEWEST_LEVELS, LEVELS_TIMES_NODES // len(hop_s)))
    levels = below[np.unique(np.linspace(0, len(below) - 1, most).astype(np.intp))]
    needs = _needs(*rows, hop_s, levels, *grid)
    seconds = _best_limit(needs, levels, float(alone), *grid)
    free_s = _hops_s(needs, levels, np.inf, *grid)
    why = (
        f"each node's cheapest partners take {alone:.4g} s to reduce with, the hops alone "
        f"{free_s:.4g} s, and cheap hops in a row scatter the stages"
    )
    return Bound(seconds * (1 - SAFETY), why)


def _sorted_rows(reduce_s: Floats) -> tuple[Ints, Ints, Floats]:
    """Per node the others by rising cost, each one's place in that order, and the sorted costs."""
    off = np.where(np.eye(len(reduce_s), dtype=bool), np.inf, reduce_s)
    order = np.argsort(off, axis=1, kind="stable")
    # The node itself is last, whatever other links are missing.
    order = np.array([[*row[row != node], node] for node, row in enumerate(order)])
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(len(off))[None, :], axis=1)
    return order, ranks, np.take_along_axis(off, order, axis=1)


def _levels(hop_s: Floats) -> Floats:
    """Every finite cost of a pair, rising, and one level above all of them."""
    upper = hop_s[np.triu_indices(len(hop_s), 1)]
    values = np.unique(upper[np.isfinite(upper)])
    return np.append(values, np.nextafter(values[-1], np.inf) if len(values) else 1.0)


def _needs(
    order_NN: Ints,
    ranks_NN: Ints,
    sorted_s: Floats,
    hop_s: Floats,
    levels: Floats,
    num_stages: int,
    num_slots: int,
) -> Floats:
    """The least reduction of a node in a cheap segment of 1..S stages, and inside of one.

    Shapes: (T, N, S + 1); the last column is for a node with a cheap hop on both sides.
    """
    off = ~np.eye(len(hop_s), dtype=bool)
    needs = np.empty((len(levels), len(hop_s), num_stages + 1))
    for at, level in enumerate(levels):
        cheap = (hop_s < level) & off
        _, parts = connected_components(cheap, directed=False)
        parts = parts.astype(np.int64)
        sizes = np.bincount(parts).astype(np.int64)
        _fill_needs(order_NN, ranks_NN, sorted_s, cheap, parts, sizes, num_slots, needs[at])
    return needs


@compiled
def _fill_needs(
    order_NN: Ints,
    ranks_NN: Ints,
    sorted_s: Floats,
    cheap: NDArray[np.bool_],
    parts: Ints,
    sizes: Ints,
    num_slots: int,
    needs_NS: Floats,
) -> None:
    """One level: partners under the room in each component, and beside the hop's neighbours."""
    count, longest = needs_NS.shape[0], needs_NS.shape[1] - 1
    room = np.empty(len(sizes), dtype=np.int64)
    for length in range(1, longest + 1):
        for node in range(count):
            for part in range(len(sizes)):
                room[part] = sizes[part] // length
            room[parts[node]] -= 1
            total, taken = 0.0, 0
            if room[parts[node]] < 0:
                total = np.inf
            for at in range(count - 1):
                if taken == num_slots - 1:
                    break
                part = parts[order_NN[node, at]]
                if room[part] > 0:
                    room[part] -= 1
                    taken += 1
                    total += sorted_s[node, at]
            if taken < num_slots - 1:
                total = np.inf
            needs_NS[node, length - 1] = total
    for node in range(count):
        first, second = -1, -1  # the cheap neighbours that are the dearest partners
        for other in range(count):
            if cheap[node, other]:
                rank = ranks_NN[node, other]
                if rank > first:
                    first, second = rank, first
                elif rank > second:
                    second = rank
        one = _without(sorted_s[node], num_slots - 1, first, -1, 1)
        two = _without(sorted_s[node], num_slots - 1, first, second, 2)
        for length in range(2, longest + 1):
            needs_NS[node, length - 1] = max(needs_NS[node, length - 1], one)
        # Only the inner stages of a segment have two neighbours, so that is a column of its own.
        needs_NS[node, longest] = two


@compiled
def _without(row_s: Floats, wanted: int, first: int, second: int, num_gone: int) -> float:
    """The sum of the `wanted` least of a sorted row without the places `first` and `second`."""
    if first < 0 or (num_gone == 2 and second < 0):
        return np.inf
    total, taken = 0.0, 0
    for at in range(len(row_s) - 1):
        if taken == wanted:
            break
        if at != first and at != second:
            total += row_s[at]
            taken += 1
    return total if taken == wanted else np.inf


def _best_limit(
    needs: Floats, levels: Floats, alone_s: float, num_stages: int, num_slots: int
) -> float:
    """The least, over the limits D, of D plus the hops that everything below the next one forces.

    A grid whose reduction is between two limits costs at least the lower one, and its hops at
    least what a reduction just below the higher one forces. What is forced only changes at a need.
    """
    top = alone_s + _hops_s(needs, levels, alone_s, num_stages, num_slots)
    values = np.unique(needs[np.isfinite(needs) & (needs >= alone_s) & (needs <= top)])
    limits = values[np.unique(np.linspace(0, len(values) - 1, NUM_LIMITS).astype(np.intp))]
    if limits[-1] < top < np.inf:
        limits = np.append(limits, top)
    below = np.append(np.nextafter(limits[1:], 0.0), np.inf)
    hops = [_hops_s(needs, levels, limit, num_stages, num_slots) for limit in below]
    return float(np.min(limits + np.array(hops)))


@compiled
def _num_dear(needs_NS: Floats, limit_s: float, num_stages: int, num_slots: int) -> int:
    """How many hops cannot be cheap if no node's reduction is above the limit.

    The j-th longest segment that a stage is in is at most what the (j * V)-th most patient node
    allows; a stage in a segment of m stages stands for 1 - 1/m cheap hops. And each cheap hop has
    two sides: no more than the stages that bear one, plus those that bear two.
    """
    longest = num_stages
    nodes, inner = np.zeros(longest + 1, dtype=np.int64), 0
    for node in range(len(needs_NS)):
        length = 0
        for m in range(longest):
            if needs_NS[node, m] <= limit_s and needs_NS[node, m] < np.inf:
                length = m + 1
        nodes[length] += 1
        inner += needs_NS[node, longest] <= limit_s and needs_NS[node, longest] < np.inf
    cheap, placed, able = 0.0, 0, 0
    for length in range(longest, 1, -1):
        able += nodes[length]
        stages = min(able // num_slots, num_stages) - placed
        cheap += stages * (1.0 - 1.0 / length)
        placed += stages
    sides = placed + min(inner // num_slots, num_stages)
    return num_stages - 1 - min(int(np.floor(cheap + 1e-6)), sides // 2, num_stages - 1)


@compiled
def _hops_s(
    needs: Floats, levels: Floats, limit_s: float, num_stages: int, num_slots: int
) -> float:
    """The least sum of hops under a limit: between two levels as many are dear as at the upper."""
    total, before = 0.0, 0.0
    for at in range(len(levels)):
        dear = _num_dear(needs[at], limit_s, num_stages, num_slots)
        total += (levels[at] - before) * dear
        before = levels[at]
    return total
