"""What a placement puts on each link and each node: for a picture, not for the search."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from swarmnode.coordinator.objective import NOBODY, Arrangement
from swarmnode.coordinator.topology import Topology


class Place(NamedTuple):
    """One slot of an arrangement."""

    stage: int
    slot: int


@dataclass(frozen=True)
class Load:
    """What is on links and nodes while an arrangement runs."""

    wires: Mapping[tuple[Place, Place], float]
    wire_unit: str
    nodes: Mapping[Place, float]
    """What each slot's node is busy with; the greatest bounds the plan."""
    node_unit: str
    stages: Sequence[float] = ()
    """What each stage spends in its reduction, in seconds."""
    worst_wires: frozenset[tuple[Place, Place]] = frozenset()
    worst_nodes: frozenset[Place] = frozenset()


Loads = Callable[[Arrangement], Load]


def _hops(arrangement: Arrangement) -> list[tuple[Place, Place, int, int]]:
    """Every hop of every pipeline, with its two nodes."""
    rows = arrangement.slots
    return [
        (Place(s, v), Place(s + 1, v), rows[s][v], rows[s + 1][v])
        for s in range(len(rows) - 1)
        for v in range(len(rows[s]))
    ]


def _worst(loads: Mapping[Any, float]) -> frozenset[Any]:
    """The key of the greatest load, if anything has any."""
    if not loads:
        return frozenset()
    key = max(loads, key=lambda key: loads[key])
    return frozenset([key]) if loads[key] > 0 else frozenset()


def grid_loads(topology: Topology, activation_bytes: float, gradient_bytes: float) -> Loads:
    """DT-FM's cost: a whole batch over each hop, forward and back, and sharded reductions."""
    hop_s = topology.transfer_s(activation_bytes)

    def loads(arrangement: Arrangement) -> Load:
        wires = {(a, b): 2.0 * float(hop_s[i, j]) for a, b, i, j in _hops(arrangement)}
        nodes, stages = {}, []
        for s, row in enumerate(arrangement.slots):
            shard_s = topology.transfer_s(gradient_bytes / len(row))
            sums = [2.0 * float(sum(shard_s[i, j] for j in row)) for i in row]
            nodes.update({Place(s, v): seconds for v, seconds in enumerate(sums)})
            stages.append(max(sums))
        return Load(
            wires, "seconds of transfer an iteration, there and back", nodes,
            "the node whose gradient exchange takes longest",
            stages, _worst(wires), _worst(nodes),
        )  # fmt: skip

    return loads


def training_loads(topology: Topology, devices: Sequence[Any], workload: Any, slots: int) -> Loads:
    """Our own cost: frames of all microbatches over each hop, and compute on each node."""
    per_pipeline = workload.num_microbatches // slots

    def share(value: Any, i: int, j: int) -> float:
        return float(value) if isinstance(value, float | int) else float(value[i, j])

    def hop_s(i: int, j: int) -> float:
        there = workload.activation_bytes * share(workload.activation_share, i, j)
        back = workload.activation_bytes * share(workload.activation_gradient_share, j, i)
        seconds = 0.0
        for num_bytes, a, b in ((there, i, j), (back, j, i)):
            speed = float(topology.bytes_per_s[a, b])
            if a != b and speed > 0:
                seconds += per_pipeline * num_bytes / speed
        return seconds

    def loads(arrangement: Arrangement) -> Load:
        wires = {(a, b): hop_s(i, j) for a, b, i, j in _hops(arrangement)}
        needs = workload.needs(arrangement.layers, slots)
        busy: dict[int, float] = {}
        for s, row in enumerate(arrangement.slots):
            for node in row:
                device = devices[node]
                work = max(
                    needs[s].flops / device.flops,
                    needs[s].touched_bytes / device.memory_bytes_per_s,
                )
                busy[node] = busy.get(node, 0.0) + per_pipeline * work
        nodes = {
            Place(s, v): busy[node]
            for s, row in enumerate(arrangement.slots)
            for v, node in enumerate(row)
        }
        worst = max(nodes.values())
        return Load(
            wires, "seconds of transfer a step, there and back", nodes,
            "the node that computes longest", (), _worst(wires),
            frozenset(place for place, seconds in nodes.items() if seconds == worst),
        )  # fmt: skip

    return loads


def serving_loads(objective: Any, instance: Any) -> Loads:
    """Tokens per second over each link of a maximum flow."""

    def loads(arrangement: Arrangement) -> Load:
        from swarmnode.coordinator.cost.serving import serving_flow

        place = {
            node: Place(r, v)
            for r, row in enumerate(arrangement.slots)
            for v, node in enumerate(row)
            if node != NOBODY
        }
        flow = serving_flow(instance, arrangement, objective.rules)
        wires: dict[tuple[Place, Place], float] = {}
        nodes: dict[Place, float] = dict.fromkeys(place.values(), 0.0)
        for chain in flow.chains if flow else ():
            for node in chain.nodes:
                nodes[place[node]] += chain.tokens_per_s
            for a, b in zip(chain.nodes, chain.nodes[1:], strict=False):
                key = (place[a], place[b])
                wires[key] = wires.get(key, 0.0) + chain.tokens_per_s
        cut_nodes = [place[n] for n in flow.cut_nodes if n in place] if flow else []
        cut_links = [(a, b) for a, b in flow.cut_links if a in place and b in place] if flow else []
        return Load(
            wires, "tokens/s in a maximum flow", nodes,
            "nodes that bound the throughput (least cut)", (),
            frozenset((place[a], place[b]) for a, b in cut_links), frozenset(cut_nodes),
        )  # fmt: skip

    return loads
