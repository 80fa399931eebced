"""A serving placement in words: who holds what and why, what bounds it, what would help."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from swarmnode.coordinator.cost.serving import (
    Flow,
    ServingInstance,
    ServingRules,
    held_ranges,
    serving_flow,
)
from swarmnode.coordinator.objective import NOBODY, Arrangement
from swarmnode.coordinator.solver.serving.bound import throughput_bound
from swarmnode.coordinator.topology import LOCAL_BYTES_PER_S, make_topology

MAX_KINDS = 6
RESOLVE_MOVES = 60_000


def explain_serving(
    instance: ServingInstance,
    rules: ServingRules,
    arrangement: Arrangement,
    top: float,
    resolve: Callable[[ServingInstance, int], float],
) -> tuple[str, ...]:
    """One line for each thing to know. resolve: tokens/s after a short search on an instance."""
    flow = serving_flow(instance, arrangement, rules)
    if flow is None or flow.tokens_per_s <= 0:
        why = held_ranges(arrangement, instance)[1] or "no chain leads through the whole model"
        return (f"it serves nothing: {why}",)
    return (
        f"{flow.tokens_per_s:.2f} tokens/s; no placement within the limits exceeds {top:.2f}",
        *_holdings(instance, arrangement),
        *_bottleneck(instance, arrangement, flow),
        *_latency(flow),
        *_what_if(instance, rules, arrangement, flow, resolve),
    )


def _holdings(instance: ServingInstance, arrangement: Arrangement) -> Iterator[str]:
    """What nodes of each kind hold, and how their rate falls with more."""
    held, _why = held_ranges(arrangement, instance)
    for kind in sorted(set(instance.kinds))[:MAX_KINDS]:
        nodes = [node for node in sorted(held) if instance.kinds[node] == kind]
        idle = sum(k == kind for k in instance.kinds) - len(nodes)
        if not nodes:
            yield f"{kind}: all {idle} idle"
            continue
        counts = Counter(held[node][1] - held[node][0] for node in nodes)
        sizes = ", ".join(f"{count} with {k} layers" for k, count in sorted(counts.items()))
        idle_words = f", {idle} idle" if idle else ""
        yield f"{kind}: {sizes}{idle_words}. {_why_so_many(instance, nodes[0], max(counts))}"
    for (start, stop), row in zip(arrangement.layers, arrangement.slots, strict=True):
        names = ", ".join(instance.topology.names[node] for node in row if node != NOBODY)
        yield f"layers {start}-{stop}: {names}"


def _why_so_many(instance: ServingInstance, node: int, k: int) -> str:
    """How the rate falls with layers: faster than 1 / k where the cache runs out of memory."""
    rate = instance.rate[node]
    text = f"At {k} it serves {rate[k]:.0f} tokens/s"
    if 2 * k < len(rate) and rate[2 * k] > 0:
        share = rate[2 * k] / rate[k]
        why = "memory for the cache shrinks too" if share < 0.49 else "as its speed is shared"
        return f"{text}, at {2 * k} {share:.2f} times that: {why}"
    most = int(np.flatnonzero(rate).max(initial=0))
    return f"{text}, and more than {most} do not fit beside a cache"


def _bottleneck(instance: ServingInstance, arrangement: Arrangement, flow: Flow) -> Iterator[str]:
    held, _why = held_ranges(arrangement, instance)
    name = instance.topology.names
    nodes = [f"{name[n]} (layers {held[n][0]}-{held[n][1]})" for n in flow.cut_nodes]
    ends = {NOBODY: "outside"}
    links = [f"{ends.get(i) or name[i]} to {ends.get(j) or name[j]}" for i, j in flow.cut_links]
    if nodes:
        yield f"the least cut goes through the nodes {', '.join(nodes)}"
    if links:
        yield f"the least cut goes through the links {', '.join(links)}"


def _latency(flow: Flow) -> Iterator[str]:
    yield (
        f"a token passes at most {flow.hops} nodes, {flow.latency_s:.4g} s on the slowest chain "
        f"and {flow.least_latency_s:.4g} s on the quickest; {len(flow.chains)} chains carry flow"
    )


def _what_if(
    instance: ServingInstance,
    rules: ServingRules,
    arrangement: Arrangement,
    flow: Flow,
    resolve: Callable[[ServingInstance, int], float],
) -> Iterator[str]:
    """One more node of each kind (searched again), links twice as fast (the same placement)."""
    first_of = {kind: node for node, kind in reversed(list(enumerate(instance.kinds)))}
    for kind, node in sorted(first_of.items())[:MAX_KINDS]:
        larger = with_twin(instance, node)
        found = max(flow.tokens_per_s, resolve(larger, RESOLVE_MOVES))
        most = throughput_bound(larger, rules)[0]
        gain = found - flow.tokens_per_s
        yield f"one more {kind}: +{gain:.1f} tokens/s by a short search, at most {most:.1f} in all"
    faster = replace(instance, link_tokens_per_s=2.0 * instance.link_tokens_per_s)
    again = serving_flow(faster, arrangement, rules)
    gain = again.tokens_per_s - flow.tokens_per_s if again else 0.0
    yield f"links twice as fast: +{max(0.0, gain):.1f} tokens/s with this placement"


def with_twin(instance: ServingInstance, node: int) -> ServingInstance:
    """The swarm with one more node like `node`; between the two runs the best link of `node`."""
    rows = [*range(instance.num_nodes), node]
    link = instance.link_tokens_per_s[np.ix_(rows, rows)].copy()
    best = float(instance.link_tokens_per_s[node].max(initial=0.0))
    link[node, -1] = link[-1, node] = best
    latency = instance.latency_s[np.ix_(rows, rows)].copy()
    usable = instance.link_tokens_per_s[node] > 0
    near_s = float(instance.latency_s[node][usable].min()) if usable.any() else 0.0
    latency[node, -1] = latency[-1, node] = near_s
    names = [*instance.topology.names, f"{instance.topology.names[node]} twin"]
    speed = np.where(link > 0, LOCAL_BYTES_PER_S, 0.0)  # only which links exist is read of it
    return ServingInstance(
        topology=make_topology(names, latency, speed),
        num_layers=instance.num_layers,
        rate=instance.rate[rows],
        link_tokens_per_s=link,
        source_tokens_per_s=instance.source_tokens_per_s[rows],
        sink_tokens_per_s=instance.sink_tokens_per_s[rows],
        layer_s=instance.layer_s[rows],
        kinds=tuple(instance.kinds[i] for i in rows),
    )
