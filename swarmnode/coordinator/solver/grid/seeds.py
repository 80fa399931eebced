"""Where a search starts: whole grids made by simple rules, each good on some kind of network.

Each takes the nodes to use in some order and returns all of them as a grid (S, V).
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def usable_nodes(distance: Floats, needed: int, pin: Ints) -> Ints:
    """The `needed` nodes to keep: pinned ones, then those nearest to their nearest others.

    Shapes: distance (N, N) symmetric, pin (N,) -> (needed,).
    """
    nearest = np.sort(distance, axis=1)[:, : max(2, needed // 2)].mean(axis=1)
    nearest[pin >= 0] = -1.0
    return np.sort(np.argsort(nearest, kind="stable")[:needed]).astype(np.int64)


def tour(nodes: Ints, distance: Floats) -> Ints:
    """`nodes` so that neighbours are near: always on to the nearest node that is left.

    It starts at the node that is farthest from all, so that no outlier is left for the end.
    """
    left = [int(node) for node in nodes]
    current = left[int(distance[np.ix_(nodes, nodes)].sum(axis=1).argmax())]
    left.remove(current)
    path = [current]
    while left:
        current = left.pop(int(distance[current, left].argmin()))
        path.append(current)
    return np.array(path, dtype=np.int64)


def pipelines_together(nodes: Ints, distance: Floats, stages: int, slots: int) -> Ints:
    """Each pipeline takes neighbours of the tour: transfers are short, exchanges long."""
    return np.ascontiguousarray(tour(nodes, distance).reshape(slots, stages).T)


def stages_together(nodes: Ints, distance: Floats, stages: int, slots: int) -> Ints:
    """Each stage takes neighbours of the tour: exchanges are short, transfers long."""
    return tour(nodes, distance).reshape(stages, slots)


def greedy(nodes: Ints, reduce_s: Floats, stages: int, slots: int) -> Ints:
    """Stage by stage, from the worst connected node left: whoever raises its row sums least."""
    left = [int(node) for node in nodes]
    both_s = reduce_s + reduce_s.T
    grid = np.empty((stages, slots), dtype=np.int64)
    for s in range(stages):
        first = left[int(both_s[np.ix_(left, left)].sum(axis=1).argmax())]
        left.remove(first)
        members, sums_s = [first], both_s[first].copy()
        while len(members) < slots:
            node = left.pop(int(sums_s[left].argmin()))
            members.append(node)
            sums_s += both_s[node]
        grid[s] = members
    return grid


def shuffled(nodes: Ints, stages: int, slots: int, random: np.random.Generator) -> Ints:
    """The nodes anywhere."""
    return np.asarray(random.permutation(nodes).reshape(stages, slots), dtype=np.int64)


def obey(grid: Ints, pin: Ints) -> Ints:
    """The grid with each pinned node exchanged into its stage. Shapes: grid (S, V), pin (N,)."""
    grid = grid.copy()
    for node in np.flatnonzero(pin >= 0):
        stage = int(pin[node])
        if node in grid[stage]:
            continue
        slot = next(v for v, other in enumerate(grid[stage]) if pin[other] != stage)
        elsewhere = grid == node
        grid[elsewhere] = grid[stage, slot]
        grid[stage, slot] = node
    return grid
