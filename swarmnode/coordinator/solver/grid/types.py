"""Nodes that could swap places without changing any cost: one type each.

Letters: N nodes, T types.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
ALIKE = 1e-9
"""Costs that differ by at most this share count as equal."""


@dataclass(frozen=True)
class TypedCosts:
    """The matrices of a swarm with one row for each type of node.

    The tables hold the least cost between any two different members, so a bound that is proven
    on them holds for the swarm. The diagonal is for two members of one type; 0 for a type of one.
    """

    members: tuple[tuple[int, ...], ...]
    """Per type its nodes, ascending."""
    reduce_s: Floats
    hop_s: Floats

    @property
    def num_types(self) -> int:
        return len(self.members)


def group_nodes(*costs_s: Floats, tolerance: float = ALIKE) -> tuple[tuple[int, ...], ...]:
    """The nodes by type: each member could swap with the first member in every matrix.

    With a small `tolerance` (relative, per entry) the members are interchangeable; with 0.05
    they are near-identical, and the types are a view of the swarm rather than the swarm.
    Shapes: every matrix (N, N); diagonals are not read; inf only equals inf.
    Bound: members of one type differ by at most twice the tolerance.
    """
    directed = [np.where(np.eye(len(c), dtype=bool), 0.0, c) for c in costs_s]
    views = [view for cost in directed for view in (cost, cost.T)]
    # A swap permutes a row's entries, so like rows have like sums: a cheap sieve for N = 1000.
    sums_NK = np.stack([np.where(np.isfinite(v), v, 0.0).sum(axis=1) for v in views], axis=1)
    gaps_NK = np.stack([np.isinf(v).sum(axis=1) for v in views], axis=1)
    left = np.arange(len(directed[0]))
    types: list[tuple[int, ...]] = []
    while len(left):
        first = left[0]
        sieve = (gaps_NK[left] == gaps_NK[first]).all(axis=1)
        sieve &= _close(sums_NK[left], sums_NK[first], 2 * tolerance + ALIKE).all(axis=1)
        like = np.zeros(len(left), dtype=bool)
        like[sieve] = _swappable(views, int(first), left[sieve], tolerance)
        like[0] = True
        types.append(tuple(int(node) for node in left[like]))
        left = left[~like]
    return tuple(types)


def typed_costs(reduce_s: Floats, hop_s: Floats, *, tolerance: float = ALIKE) -> TypedCosts:
    """The types of a swarm and the least costs among them. Shapes: see `group_nodes`."""
    members = group_nodes(reduce_s, hop_s, tolerance=tolerance)
    return TypedCosts(members, _least(reduce_s, members), _least(hop_s, members))


def _swappable(views: list[Floats], first: int, nodes: NDArray[np.intp], share: float) -> Flags:
    """For each of `nodes` whether it could swap with `first`. Shapes: (len(nodes),) bool."""
    like = np.ones(len(nodes), dtype=bool)
    for view in views:
        mine = np.broadcast_to(view[first], (len(nodes), len(view))).copy()
        theirs = view[nodes].copy()
        # The two see each other, each from its own side: there the columns swap as well.
        mine[:, first] = view[first, nodes]
        theirs[np.arange(len(nodes)), nodes] = view[first, nodes]
        like &= _close(theirs, mine, share).all(axis=1)
    return like


def _close(left: Floats, right: Floats, share: float) -> Flags:
    with np.errstate(invalid="ignore"):
        near = np.abs(left - right) <= share * np.minimum(left, right)
    return np.asarray(near & np.isfinite(left) | (left == right), dtype=np.bool_)


def _least(cost_s: Floats, members: tuple[tuple[int, ...], ...]) -> Floats:
    """The least cost between members of two types. Shapes: (T, T)."""
    off = np.where(np.eye(len(cost_s), dtype=bool), np.inf, cost_s)
    order = np.concatenate([np.asarray(nodes, dtype=np.intp) for nodes in members])
    starts = np.cumsum([0] + [len(nodes) for nodes in members[:-1]])
    rows = np.minimum.reduceat(off[order], starts, axis=0)
    least = np.minimum.reduceat(rows[:, order], starts, axis=1)
    alone = np.array([len(nodes) == 1 for nodes in members])
    least[np.diag(alone)] = 0.0
    return np.asarray(least, dtype=np.float64)
