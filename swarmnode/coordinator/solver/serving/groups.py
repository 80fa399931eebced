"""A seed for swarms of few kinds: the best chain whose stages are groups of alike nodes.

At a target of F tokens/s a group of m nodes of one kind holds as many layers k as keep
m * T(k) >= F. Which groups to form, with so many nodes of each kind and at most H groups, is a
small knapsack, solved exactly for each F; the largest F that reaches the model is bisected.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from swarmnode.coordinator.cost.serving import ServingInstance
from swarmnode.coordinator.topology import Matrix

MAX_NODES = 64
MAX_KINDS = 8
MAX_GROUP = 5

Ranges = NDArray[np.int64]
Group = tuple[int, int, int]
"""Kind, nodes, layers."""
Plan = tuple[int, tuple[Group, ...]]
"""Layers held in all, and by which groups."""


def grouped_chain(instance: ServingInstance, max_hops: int) -> Ranges | None:
    """Ranges (N, 2) of the best such chain of at most `max_hops` groups, links aside.

    None if there is none, or if the swarm has too many nodes or kinds for this to be quick.
    """
    rows, kind_of = np.unique(instance.rate, axis=0, return_inverse=True)
    kind_of = kind_of.reshape(-1)
    if instance.num_nodes > MAX_NODES or len(rows) > MAX_KINDS:
        return None
    members = [np.flatnonzero(kind_of == kind).tolist() for kind in range(len(rows))]
    levels = np.unique(np.outer(rows[rows > 0], np.arange(1, MAX_GROUP + 1)))
    low, high, best = 0, len(levels) - 1, None
    while low <= high:
        middle = (low + high) // 2
        plan = _most_layers(rows, members, float(levels[middle]), max_hops)
        if plan[0] >= instance.num_layers:
            best, low = plan, middle + 1
        else:
            high = middle - 1
    return None if best is None else _ranges(instance, members, best)


def _most_layers(rows: Matrix, members: list[list[int]], target: float, max_hops: int) -> Plan:
    """The most layers that at most `max_hops` groups hold at `target` tokens/s."""
    total: dict[int, Plan] = {0: (0, ())}
    for kind, nodes in enumerate(members):
        mine = _groups_of_kind(rows[kind], kind, len(nodes), target, max_hops)
        joined: dict[int, Plan] = {}
        for hops, (layers, groups) in total.items():
            for more, (extra, others) in mine.items():
                count, plan = hops + more, (layers + extra, groups + others)
                if count <= max_hops and plan[0] > joined.get(count, (-1, ()))[0]:
                    joined[count] = plan
        total = joined
    return max(total.values(), key=lambda plan: plan[0])


def _groups_of_kind(
    rate: Matrix, kind: int, count: int, target: float, max_hops: int
) -> dict[int, Plan]:
    """By the number of groups: the best plan that one kind's nodes allow."""
    k = np.arange(len(rate))
    sizes = range(1, min(MAX_GROUP, count) + 1)
    holds = {m: int(((m * rate >= target * (1 - 1e-12)) * k).max()) for m in sizes}
    by_nodes: dict[int, Plan] = {0: (0, ())}
    best: dict[int, Plan] = {0: (0, ())}
    for hops in range(1, min(count, max_hops) + 1):
        after: dict[int, Plan] = {}
        for used, (layers, groups) in by_nodes.items():
            for m, more in holds.items():
                is_better = layers + more > after.get(used + m, (0, ()))[0]
                if more > 0 and used + m <= count and is_better:
                    after[used + m] = (layers + more, (*groups, (kind, m, more)))
        if not after:
            break
        by_nodes = after
        best[hops] = max(after.values(), key=lambda plan: plan[0])
    return best


def _ranges(instance: ServingInstance, members: list[list[int]], plan: Plan) -> Ranges:
    """Lay the groups one behind the other."""
    ranges = np.zeros((instance.num_nodes, 2), dtype=np.int64)
    left = [list(nodes) for nodes in members]
    over, at = plan[0] - instance.num_layers, 0
    for kind, size, layers in plan[1]:
        cut = min(over, layers)
        over -= cut
        if layers == cut:
            continue
        for _ in range(size):
            ranges[left[kind].pop(0)] = at, at + layers - cut
        at += layers - cut
    return ranges


def grouped_seeds(instance: ServingInstance, max_hops: int | None) -> Iterator[tuple[str, Ranges]]:
    """The chain under the limit, and somewhat shorter ones."""
    most = min(max_hops or instance.num_nodes, instance.num_nodes)
    for hops in sorted({most, max(1, most - 1)}, reverse=True):
        ranges = grouped_chain(instance, hops)
        if ranges is not None:
            yield f"{hops} groups of alike nodes", ranges
