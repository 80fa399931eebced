"""What is exact about a grid once its stages are chosen: who pairs with whom, and stage order.

Hops do not depend on each other given the stages, so each one is a bottleneck assignment; the
order of the stages is the shortest path that visits each once. Without compiled code, so that a
process that was just started is quick too.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST_EXACT_STAGES = 12
"""Held-Karp looks at 2**S sets of stages; above this, local search orders them."""
LEAST_GAIN = 1e-9


def pair_up(cost: Floats) -> tuple[Ints, float]:
    """The perfect matching whose dearest pair is cheapest: the column of each row, and its cost.

    Shapes: cost (V, V) -> (V,). A binary search over the distinct costs; whether a threshold
    allows a perfect matching is an assignment problem with costs 0 and 1.
    """
    lower = max(float(cost.min(axis=0).max()), float(cost.min(axis=1).max()))
    levels = np.unique(cost[cost >= lower])
    low, high = 0, len(levels) - 1
    probe = 0  # the lower bound is often reached: try it first
    while low < high:
        if _match(cost > levels[probe]) is not None:
            high = probe
        else:
            low = probe + 1
        probe = (low + high) // 2
    columns = _match(cost > levels[high])
    assert columns is not None
    return columns, float(levels[high])


def _match(forbidden: NDArray[np.bool_]) -> Ints | None:
    """A perfect matching without forbidden pairs: the column of each row; None if there is none."""
    rows, columns = linear_sum_assignment(forbidden)
    return None if forbidden[rows, columns].any() else np.asarray(columns, dtype=np.int64)


def pair_hops(grid: Ints, hop: Floats) -> Ints:
    """The same stages in the same order, with the lanes drawn anew so that each hop is best.

    Shapes: grid (S, V), hop (N, N) -> (S, V).
    """
    lanes = grid.copy()
    for s in range(1, len(grid)):
        columns, _ = pair_up(hop[np.ix_(lanes[s - 1], grid[s])])
        lanes[s] = grid[s][columns]
    return lanes


def stage_distances(grid: Ints, hop: Floats) -> Floats:
    """The best hop between each two stages. Shapes: grid (S, V), hop (N, N) -> (S, S)."""
    count = len(grid)
    between = np.zeros((count, count))
    for s in range(count):
        for t in range(s + 1, count):
            _, between[s, t] = pair_up(hop[np.ix_(grid[s], grid[t])])
            between[t, s] = between[s, t]
    return between


def order_stages(between: Floats, seat: Floats) -> list[int]:
    """In which order to visit all stages, each once: least sum of hops and of seats.

    Shapes: between (S, S) symmetric; seat[stage, place] is what standing in that place costs.
    Exact up to MOST_EXACT_STAGES stages.
    """
    if len(between) <= MOST_EXACT_STAGES:
        return _held_karp(between, seat)
    return _improve_order(list(range(len(between))), between, seat)


def _held_karp(between: Floats, seat: Floats) -> list[int]:
    """Dynamic programme over (set of stages visited, last stage)."""
    count = len(between)
    least = np.full((1 << count, count), np.inf)
    came_from = np.zeros((1 << count, count), dtype=np.int64)
    for s in range(count):
        least[1 << s, s] = seat[s, 0]
    for visited in range(1, (1 << count) - 1):
        place = visited.bit_count()
        onward = least[visited][:, None] + between
        best = onward.argmin(axis=0)
        for s in range(count):
            if not visited >> s & 1:
                least[visited | 1 << s, s] = onward[best[s], s] + seat[s, place]
                came_from[visited | 1 << s, s] = best[s]
    visited = (1 << count) - 1
    order = [int(least[visited].argmin())]
    while len(order) < count:
        before = int(came_from[visited, order[-1]])
        visited ^= 1 << order[-1]
        order.append(before)
    return order[::-1]


def _order_cost(order: list[int], between: Floats, seat: Floats) -> float:
    path = np.array(order)
    return float(between[path[:-1], path[1:]].sum() + seat[path, np.arange(len(path))].sum())


def _improve_order(order: list[int], between: Floats, seat: Floats) -> list[int]:
    """Reverse a range, or move a range elsewhere, while that helps (2-opt and or-opt)."""
    cost, improved = _order_cost(order, between, seat), True
    while improved:
        improved = False
        for other in _neighbours(order):
            price = _order_cost(other, between, seat)
            if price < cost - LEAST_GAIN * abs(cost):
                order, cost, improved = other, price, True
                break
    return order


def _neighbours(order: list[int]) -> list[list[int]]:
    count = len(order)
    ranges = [(i, j) for i in range(count) for j in range(i + 1, count + 1)]
    reversals = [order[:i] + order[i:j][::-1] + order[j:] for i, j in ranges if j > i + 1]
    shifts = [
        rest[:k] + block + rest[k:]
        for i, j in ranges
        if j <= i + 3
        for rest, block in [(order[:i] + order[j:], order[i:j])]
        for k in range(len(rest) + 1)
        if k != i
    ]
    return reversals + shifts


def polish(grid: Ints, hop: Floats, charge: Floats, pin: Ints) -> Ints:
    """The stages of `grid` in their best order and best paired; pins stay in their stage.

    Shapes: grid (S, V); hop (N, N); charge (N, S) for a node in a stage; pin (N,), -1 for none.
    """
    held = np.array([np.flatnonzero(pin[row] >= 0).size for row in grid])
    seat = np.array([[charge[row, place].sum() for place in range(len(grid))] for row in grid])
    for s in np.flatnonzero(held):
        seat[s, np.arange(len(grid)) != s] = np.inf
    order = order_stages(stage_distances(grid, hop), seat)
    return pair_hops(grid[order], hop)
