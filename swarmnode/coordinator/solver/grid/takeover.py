"""The first answer after a change: who is still there stays, the best newcomer takes each seat.

Only the lanes are drawn anew, which moves no weights. Without compiled code, so it is as quick in
a process that was just started.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from swarmnode.coordinator.objective import NOBODY
from swarmnode.coordinator.solver.grid import seeds
from swarmnode.coordinator.solver.grid.polish import pair_hops
from swarmnode.coordinator.solver.grid.problem import GridProblem

Ints = NDArray[np.int64]
MAX_TRIES = 200
"""Exchanges of newcomers that are looked at: 0.1 ms each at 64 nodes."""


def take_over(problem: GridProblem, old: Ints) -> Ints:
    """`old` with every free seat taken and every hop paired best; pins are obeyed.

    Shapes: old (S, V), NOBODY where the host is gone; enough nodes are there for all seats.
    """
    grid = _without_doubles(old, problem.num_nodes)
    free = np.setdiff1d(np.arange(problem.num_nodes), grid)
    empty = np.argwhere(grid == NOBODY)
    if len(empty):
        rise = np.array([[_rise(problem, grid, int(s), int(n)) for n in free] for s, _ in empty])
        seats, chosen = linear_sum_assignment(rise)
        grid[tuple(empty[seats].T)] = free[chosen]
    grid = _pair(problem, seeds.obey(grid, problem.pin))
    return _exchange(problem, grid, set(free.tolist()))


def _without_doubles(old: Ints, num_nodes: int) -> Ints:
    """A node keeps the first of its seats; nodes that do not exist keep none."""
    flat = old.ravel().copy()
    _, firsts = np.unique(flat, return_index=True)
    again = np.ones(len(flat), dtype=bool)
    again[firsts] = False
    flat[again | (flat < 0) | (flat >= num_nodes)] = NOBODY
    return flat.reshape(old.shape)


def _rise(problem: GridProblem, grid: Ints, stage: int, node: int) -> float:
    """What a newcomer costs a stage: the dearest row sum, and the nearest partners at its hops."""
    members = grid[stage][grid[stage] != NOBODY]
    together = np.append(members, node)
    cost_s = float(problem.reduce_s[np.ix_(together, together)].sum(axis=1).max())
    for beside in (stage - 1, stage + 1):
        if 0 <= beside < len(grid) and (grid[beside] != NOBODY).any():
            others = grid[beside][grid[beside] != NOBODY]
            cost_s += float(problem.hop_s[node, others].min())
    return cost_s + float(problem.charge_s[node, stage])


def _pair(problem: GridProblem, grid: Ints) -> Ints:
    paired = pair_hops(grid, problem.hop_s)
    return paired if problem.cost(paired) < problem.cost(grid) else grid


def _exchange(problem: GridProblem, grid: Ints, free: set[int]) -> Ints:
    """Newcomers trade seats, or give theirs to a spare node, while that lowers the cost."""
    best_s = problem.cost(grid)
    seated = [node for node in grid.ravel().tolist() if node in free and problem.pin[node] < 0]
    spare = sorted(free - set(grid.ravel().tolist()))
    pairs = [(a, b) for i, a in enumerate(seated) for b in [*seated[i + 1 :], *spare]]
    for a, b in pairs[:MAX_TRIES]:
        other = grid.copy()
        other[grid == a], other[grid == b] = b, a
        if problem.cost(other) < best_s:
            grid, best_s = other, problem.cost(other)
    return _pair(problem, grid)
