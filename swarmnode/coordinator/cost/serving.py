"""What serving costs: tokens per second as a maximum flow, latency as the longest chain.

Every node holds one range of layers or nothing. A token goes from a node whose range ends at
layer b to one that holds layer b: exactly where the ranges meet, or, with `partial` ranges, also
into the middle of a longer range. The flow is bounded by nodes, links, source and sink.

Source: the max-flow over layer ranges is Helix's (arXiv:2406.01566); limits on chains are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from swarmnode.coordinator.cost.maxflow import FlowGraph
from swarmnode.coordinator.cost.serving_instance import (
    ServingDevice,
    ServingInstance,
    ServingModel,
    parse_serving,
    serving_instance,
)
from swarmnode.coordinator.objective import NOBODY, Arrangement, Price

__all__ = [
    "Chain",
    "Flow",
    "ServingDevice",
    "ServingInstance",
    "ServingModel",
    "ServingRules",
    "held_ranges",
    "parse_serving",
    "price_serving",
    "serving_flow",
    "serving_instance",
]

Range = tuple[int, int]


@dataclass(frozen=True)
class ServingRules:
    """What is asked of a placement besides tokens per second."""

    max_hops: int | None = None
    """The most nodes in any chain that tokens could take."""
    max_latency_s: float | None = None
    latency_weight: float = 0.0
    """Seconds per token that a second of latency is worth."""
    partial: bool = True
    """Whether a token may enter a range in its middle."""
    grid: tuple[int, int] | None = None
    """(S stages, V slots): columns of the arrangement are the only chains."""

    def allow(self, hops: int, latency_s: float) -> bool:
        """Whether chains this long are within the limits."""
        return (self.max_hops is None or hops <= self.max_hops) and (
            self.max_latency_s is None or latency_s <= self.max_latency_s * (1 + 1e-12)
        )


@dataclass(frozen=True)
class Chain:
    """One way that tokens take, with how many."""

    nodes: tuple[int, ...]
    tokens_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Flow:
    """A maximum flow, and how long the chains that could carry it are."""

    tokens_per_s: float
    chains: tuple[Chain, ...]
    hops: int
    """Nodes in the longest usable chain, whether it carries flow or not; 0 if there is none."""
    latency_s: float
    """Of the slowest usable chain."""
    least_latency_s: float
    cut_nodes: tuple[int, ...]
    """Nodes whose rate is in the least cut: the bottleneck."""
    cut_links: tuple[tuple[int, int], ...]
    """Links in the least cut; NOBODY stands for the source and the sink."""


def held_ranges(
    arrangement: Arrangement, instance: ServingInstance
) -> tuple[dict[int, Range], str]:
    """By node: the range it holds; and why the arrangement is impossible, or an empty text."""
    held: dict[int, Range] = {}
    if len(arrangement.slots) != len(arrangement.layers):
        return {}, "it has not one range of layers for each row"
    for (start, stop), row in zip(arrangement.layers, arrangement.slots, strict=True):
        if not 0 <= start < stop <= instance.num_layers:
            return {}, f"it has the layers {start}-{stop} of {instance.num_layers}"
        for node in row:
            if node == NOBODY:
                continue
            if not 0 <= node < instance.num_nodes:
                return {}, f"there is no node {node}"
            if node in held:
                return {}, f"node {node} is in it twice"
            if instance.rate[node, stop - start] <= 0:
                return {}, f"node {node} has no room for {stop - start} layers"
            held[node] = (start, stop)
    return held, ""


def price_serving(
    instance: ServingInstance, arrangement: Arrangement, rules: ServingRules
) -> Price:
    """Seconds per token, 1 / throughput, plus latency_weight times the latency; inf if impossible.

    The limits hold for every usable chain, the longest path through the graph of ranges, not
    only for those that one maximum flow happens to take: a router may use any of them. The
    latency that counts is that of the slowest usable chain. Nothing is said about queueing.
    """
    flow = serving_flow(instance, arrangement, rules)
    if flow is None or flow.tokens_per_s <= 0:
        return Price(inf, {"tokens_per_s": 0.0, "hops": 0.0, "num_chains": 0.0})
    parts = {
        "tokens_per_s": flow.tokens_per_s,
        "latency_s": flow.latency_s,
        "flow_latency_s": max(chain.latency_s for chain in flow.chains),
        "least_latency_s": flow.least_latency_s,
        "hops": float(flow.hops),
        "num_chains": float(len(flow.chains)),
        "num_nodes": float(len(arrangement.nodes)),
    }
    if not rules.allow(flow.hops, flow.latency_s):
        return Price(inf, parts)
    return Price(1.0 / flow.tokens_per_s + rules.latency_weight * flow.latency_s, parts)


def serving_flow(
    instance: ServingInstance, arrangement: Arrangement, rules: ServingRules
) -> Flow | None:
    """The maximum flow through `arrangement`; None if the arrangement is impossible."""
    held, why = held_ranges(arrangement, instance)
    if why:
        return None
    if rules.grid is None:
        return range_flow(instance, held, partial=rules.partial)
    num_stages, num_slots = rules.grid
    layers = arrangement.layers
    ends = [0, *(stop for _start, stop in layers)]
    is_whole = [start for start, _stop in layers] == ends[:-1] and ends[-1] == instance.num_layers
    if len(layers) != num_stages or not is_whole:
        return None
    if any(len(row) != num_slots for row in arrangement.slots):
        return None
    return _column_flow(instance, held, list(zip(*arrangement.slots, strict=True)))


def range_flow(instance: ServingInstance, held: dict[int, Range], *, partial: bool) -> Flow:
    """The exact maximum flow over all chains of ranges that meet."""
    order = sorted(held, key=lambda node: (held[node][1], node))
    before = {j: _before(instance, held, order, j, partial=partial) for j in order}
    graph, links = _graph(instance, held, order, before)
    source, sink = 2 * len(order), 2 * len(order) + 1
    total = graph.solve(source, sink)
    worst, hops = _extreme(instance, held, order, before, slowest=True)
    best, _ = _extreme(instance, held, order, before, slowest=False)
    chains = tuple(
        _chain(instance, held, tuple(order[v // 2] for v in path[1:-1:2]), amount)
        for path, amount in graph.paths(source, sink)
    )
    near = graph.reachable(source)
    cut_nodes = [n for a, n in enumerate(order) if 2 * a in near and 2 * a + 1 not in near]
    cut_links = [pair for pair, (tail, head) in links.items() if tail in near and head not in near]
    return Flow(total, chains, hops, worst, best, tuple(sorted(cut_nodes)), tuple(cut_links))


def _before(
    instance: ServingInstance,
    held: dict[int, Range],
    order: Sequence[int],
    node: int,
    *,
    partial: bool,
) -> list[int]:
    """The nodes that may hand tokens to `node`."""
    start, stop = held[node]
    last = stop - 1 if partial else start
    link = instance.link_tokens_per_s
    return [i for i in order if start <= held[i][1] <= last and link[i, node] > 0]


def _graph(
    instance: ServingInstance,
    held: dict[int, Range],
    order: Sequence[int],
    before: dict[int, list[int]],
) -> tuple[FlowGraph, dict[tuple[int, int], tuple[int, int]]]:
    """Node a of `order` is the arc 2a -> 2a + 1; also the links by (sender, receiver)."""
    graph = FlowGraph(2 * len(order) + 2)
    source, sink = 2 * len(order), 2 * len(order) + 1
    place = {node: a for a, node in enumerate(order)}
    links: dict[tuple[int, int], tuple[int, int]] = {}
    roof = 2.0 * max((float(instance.rate[n, b - a]) for n, (a, b) in held.items()), default=0.0)

    def connect(pair: tuple[int, int], tail: int, head: int, capacity: float) -> None:
        graph.add_arc(tail, head, min(capacity, roof))  # wider than any node: keeps sums exact
        links[pair] = (tail, head)

    for node, a in place.items():
        start, stop = held[node]
        graph.add_arc(2 * a, 2 * a + 1, float(instance.rate[node, stop - start]))
        if start == 0:
            connect((NOBODY, node), source, 2 * a, float(instance.source_tokens_per_s[node]))
        if stop == instance.num_layers:
            connect((node, NOBODY), 2 * a + 1, sink, float(instance.sink_tokens_per_s[node]))
        for i in before[node]:
            room = float(instance.link_tokens_per_s[i, node])
            connect((i, node), 2 * place[i] + 1, 2 * a, room)
    return graph, links


def _extreme(
    instance: ServingInstance,
    held: dict[int, Range],
    order: Sequence[int],
    before: dict[int, list[int]],
    *,
    slowest: bool,
) -> tuple[float, int]:
    """Latency of the slowest (or quickest) usable chain, and nodes in the longest one."""
    choose = max if slowest else min
    late: dict[int, float] = {}
    hops: dict[int, int] = {}
    for j in order:
        start, stop = held[j]
        ways = [
            late[i] + float(instance.latency_s[i, j] + (stop - held[i][1]) * instance.layer_s[j])
            for i in before[j]
            if i in late
        ]
        counts = [hops[i] + 1 for i in before[j] if i in hops]
        if start == 0 and instance.source_tokens_per_s[j] > 0:
            ways.append(float(stop * instance.layer_s[j]))
            counts.append(1)
        if ways:
            late[j], hops[j] = choose(ways), max(counts)
    sink = instance.sink_tokens_per_s
    last = [j for j in late if held[j][1] == instance.num_layers and sink[j] > 0]
    if not last:
        return inf, 0
    return choose(late[j] for j in last), max(hops[j] for j in last)


def _chain(
    instance: ServingInstance, held: dict[int, Range], nodes: tuple[int, ...], amount: float
) -> Chain:
    """The chain with its latency: each node computes from where the one before it stopped."""
    late, done = 0.0, 0
    for at, node in enumerate(nodes):
        late += float((held[node][1] - done) * instance.layer_s[node])
        done = held[node][1]
        if at:
            late += float(instance.latency_s[nodes[at - 1], node])
    return Chain(nodes, amount, late)


def _column_flow(
    instance: ServingInstance, held: dict[int, Range], columns: Sequence[tuple[int, ...]]
) -> Flow:
    """The flow where columns are the only chains: each is as fast as its slowest part."""
    chains, cut_nodes, cut_links = [], [], []
    for nodes in columns:
        if NOBODY in nodes:
            continue
        rates = {n: float(instance.rate[n, held[n][1] - held[n][0]]) for n in nodes}
        links = {(i, j): float(instance.link_tokens_per_s[i, j]) for i, j in pairwise(nodes)}
        links[NOBODY, nodes[0]] = float(instance.source_tokens_per_s[nodes[0]])
        links[nodes[-1], NOBODY] = float(instance.sink_tokens_per_s[nodes[-1]])
        least = min(*rates.values(), *links.values())
        cut_nodes += [n for n, rate in rates.items() if rate == least]
        if least not in rates.values():
            cut_links += [pair for pair, room in links.items() if room == least]
        if least > 0:
            chains.append(_chain(instance, held, nodes, least))
    late = [chain.latency_s for chain in chains]
    return Flow(
        tokens_per_s=sum(chain.tokens_per_s for chain in chains),
        chains=tuple(chains),
        hops=max((len(chain.nodes) for chain in chains), default=0),
        latency_s=max(late, default=inf),
        least_latency_s=min(late, default=inf),
        cut_nodes=tuple(sorted(cut_nodes)),
        cut_links=tuple(cut_links),
    )
