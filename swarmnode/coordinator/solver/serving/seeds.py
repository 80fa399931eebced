"""Where the search for a serving placement starts: ranges built by rules, without a search."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from swarmnode.coordinator.cost.serving import ServingInstance
from swarmnode.coordinator.solver.serving.groups import grouped_seeds
from swarmnode.coordinator.topology import Matrix

Ranges = NDArray[np.int64]
"""Shapes: (N, 2): start and stop of every node, equal for an idle one."""


def seeds(
    instance: ServingInstance, max_hops: int | None, top: float
) -> Iterator[tuple[str, Ranges]]:
    """Named starting points; some may carry nothing. top: no placement serves more tokens/s."""
    everybody = range(instance.num_nodes)
    for name, ranges in grouped_seeds(instance, max_hops):
        yield name, ranges
        yield f"{name}, the others double them", spread(instance, ranges, everybody)
    for island in islands(instance):
        for hops in _hop_counts(len(island), max_hops):
            chain = best_chain(instance, island, hops)
            if chain is not None:
                yield f"one chain of {hops}", chain
                yield f"one chain of {hops}, the others double it", spread(instance, chain, island)
            stages = equal_stages(instance, island, hops)
            if stages is not None:
                yield f"{hops} equal stages", stages
        for share in (1.0, 0.8, 0.6, 0.4, 0.2):
            target = share * top
            empty = np.zeros((instance.num_nodes, 2), dtype=np.int64)
            yield f"worst window first at {target:.4g}", cover(instance, empty, island, target)


def islands(instance: ServingInstance) -> list[list[int]]:
    """Groups of nodes with links among them, in either direction; the largest first."""
    linked = (instance.link_tokens_per_s > 0) | (instance.link_tokens_per_s > 0).T
    left, groups = set(range(instance.num_nodes)), []
    while left:
        group, edge = set[int](), [min(left)]
        while edge:
            node = edge.pop()
            if node not in group:
                group.add(node)
                edge += [int(i) for i in np.flatnonzero(linked[node]) if int(i) not in group]
        left -= group
        groups.append(sorted(group))
    return sorted(groups, key=lambda group: (-len(group), group))[:8]


def _hop_counts(count: int, max_hops: int | None) -> list[int]:
    """Chain lengths to try: all small ones, then every second, third ... up to the limit."""
    most = min(count, max_hops or count)
    steps = {round(most / 1.2**i) for i in range(16)} | set(range(1, min(most, 12) + 1))
    return sorted(hops for hops in steps if hops >= 1)


def best_chain(instance: ServingInstance, island: Sequence[int], hops: int) -> Ranges | None:
    """One chain over `hops` nodes whose slowest node is the fastest possible, links aside.

    At a rate F node i can hold k_i(F) layers, so the `hops` largest must reach the model.
    """
    rate = instance.rate[list(island), 1:]
    levels = np.unique(rate[rate > 0])
    low, high, held = 0, len(levels) - 1, None
    while low <= high:
        middle = (low + high) // 2
        most = _layers_at(rate, float(levels[middle]))
        if int(np.sort(most)[-hops:].sum()) >= instance.num_layers:
            held, low = most, middle + 1
        else:
            high = middle - 1
    if held is None:
        return None
    chosen = sorted(np.argsort(-held, kind="stable")[:hops].tolist())
    layers = {island[a]: int(held[a]) for a in chosen if held[a] > 0}
    return lay_out(instance, _shrink(instance, layers))


def _layers_at(rate: Matrix, least: float) -> NDArray[np.int64]:
    """The most layers that each node holds at `least` tokens/s. Shapes: (N, K) -> (N,)."""
    k = np.arange(1, rate.shape[1] + 1)
    return np.asarray(((rate >= least) * k).max(axis=1), dtype=np.int64)


def _shrink(instance: ServingInstance, layers: dict[int, int]) -> dict[int, int]:
    """Take layers from the slowest node until they sum to the model's; a node may end empty."""
    over = sum(layers.values()) - instance.num_layers
    for _ in range(over):
        holders = [node for node, k in layers.items() if k > 0]
        slow = min(holders, key=lambda n: (instance.rate[n, layers[n]], n))
        layers[slow] -= 1
    return {node: k for node, k in layers.items() if k > 0}


def lay_out(instance: ServingInstance, layers: dict[int, int]) -> Ranges:
    """Ranges one behind the other, each time to the node with the best link from the last."""
    ranges = np.zeros((instance.num_nodes, 2), dtype=np.int64)
    link, latency = instance.link_tokens_per_s, instance.latency_s
    left, at, last = sorted(layers), 0, -1
    while left:
        if last < 0:
            node = max(left, key=lambda n: (instance.source_tokens_per_s[n], -n))
        else:
            node = max(left, key=lambda n: (link[last, n] > 0, -latency[last, n], -n))
        left.remove(node)
        ranges[node] = at, at + layers[node]
        at, last = at + layers[node], node
    return ranges


def spread(instance: ServingInstance, ranges: Ranges, island: Sequence[int]) -> Ranges:
    """Give each idle node the range of the chain that is slowest now and that it can hold."""
    ranges = ranges.copy()
    kinds = sorted({(int(a), int(b)) for a, b in ranges if b > a})
    carried = {
        kind: sum(
            float(instance.rate[n, b - a]) for n, (a, b) in enumerate(ranges) if (a, b) == kind
        )
        for kind in kinds
    }
    for node in island:
        if ranges[node, 1] > ranges[node, 0]:
            continue
        able = [kind for kind in kinds if instance.rate[node, kind[1] - kind[0]] > 0]
        if able:
            kind = min(able, key=lambda r: (carried[r], r))
            carried[kind] += float(instance.rate[node, kind[1] - kind[0]])
            ranges[node] = kind
    return ranges


def equal_stages(instance: ServingInstance, island: Sequence[int], count: int) -> Ranges | None:
    """`count` stages of equal layers, each node at the slowest stage, the fastest nodes first."""
    if count > instance.num_layers:
        return None
    ends = [round(s * instance.num_layers / count) for s in range(count + 1)]
    stages = list(pairwise(ends))
    carried = dict.fromkeys(stages, 0.0)
    ranges = np.zeros((instance.num_nodes, 2), dtype=np.int64)
    size = max(b - a for a, b in stages)
    for node in sorted(island, key=lambda n: (-instance.rate[n, size], n)):
        able = [s for s in stages if instance.rate[node, s[1] - s[0]] > 0]
        if able:
            stage = min(able, key=lambda s: (carried[s], s))
            carried[stage] += float(instance.rate[node, stage[1] - stage[0]])
            ranges[node] = stage
    return ranges


def cover(instance: ServingInstance, ranges: Ranges, nodes: Sequence[int], target: float) -> Ranges:
    """Each of `nodes`, the roomiest first, takes the window of layers that is covered worst.

    It holds as many layers as do most good at `target` tokens/s. Source: joining a swarm at its
    worst window is Petals' rule (arXiv:2312.08361); the number of layers is ours.
    """
    ranges = ranges.copy()
    covered = np.zeros(instance.num_layers)
    for node, (a, b) in enumerate(ranges):
        covered[a:b] += instance.rate[node, b - a]
    k = np.arange(instance.rate.shape[1])
    held = {n: int(np.argmax(k * np.minimum(instance.rate[n], target))) for n in nodes}
    for node in sorted(nodes, key=lambda n: (-held[n], n)):
        size = held[node]
        if size == 0:
            continue
        seen = np.concatenate([[0.0], np.cumsum(np.minimum(covered, target))])
        at = int(np.argmin(seen[size:] - seen[:-size]))
        ranges[node] = at, at + size
        covered[at : at + size] += instance.rate[node, size]
    return ranges
