"""A placement by DT-FM's cost in words: where everybody is, what bounds it, what would help."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from swarmnode.coordinator.cost.dtfm import (
    grid_price,
    hop_table,
    hop_times,
    reduction_table,
    row_sums,
)
from swarmnode.coordinator.solver.grid.polish import pair_hops
from swarmnode.coordinator.topology import Topology, make_topology

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MAX_NAMES = 8
MAX_TWINS = 64


def words_about(
    topology: Topology, gradient_bytes: float, activation_bytes: float, grid: Ints
) -> tuple[str, ...]:
    """One line for each stage, two for what bounds the cost, two for what would lower it."""
    sizes = (gradient_bytes, activation_bytes)
    reduce_s, hop_s = _tables(topology, grid.shape[1], sizes)
    price = grid_price(grid, reduce_s, hop_s)
    if not np.isfinite(price.total_s):
        return ("this placement needs a link that is missing",)
    rows_s, hops_s = row_sums(grid, reduce_s), hop_times(grid, hop_s)
    lines = [_about_stage(topology, grid[s], s, rows_s[s]) for s in range(len(grid))]
    stage, slot = np.unravel_index(int(rows_s.argmax()), rows_s.shape)
    worst = int(grid[stage, slot])
    lines.append(
        f"an iteration takes {price.total_s:.4g} s: {price.parts['data_parallel_s']:.4g} s "
        f"exchange, bound by {_name(topology, worst)} in stage {stage}, and "
        f"{price.parts['pipeline_s']:.4g} s transfers"
    )
    lines += _about_hop(topology, grid, hops_s, sizes)
    lines += _about_twin(topology, grid, worst, sizes)
    spare = np.setdiff1d(np.arange(topology.num_nodes), grid)
    if len(spare):
        lines.append(f"spare: {_names(topology, spare)}")
    return tuple(lines)


def missing_links(topology: Topology, stages: int, slots: int, pins: Mapping[int, int]) -> str:
    """Why no grid was found that has all its links: one-way nodes and islands, in one line."""
    there = topology.bytes_per_s > 0
    both = there & there.T
    np.fill_diagonal(both, False)
    np.fill_diagonal(there, False)
    alone = ~both.any(axis=1)
    one_way = np.flatnonzero(alone & (there.any(axis=1) | there.any(axis=0)))
    without = np.flatnonzero(alone & ~there.any(axis=1) & ~there.any(axis=0))
    count, island = connected_components(both, directed=False)
    islands = [np.flatnonzero(island == i) for i in range(count)]
    said = [f"only one-way links: {_names(topology, one_way)}"] if len(one_way) else []
    said += [f"no links: {_names(topology, without)}"] if len(without) else []
    large = sorted((nodes for nodes in islands if len(nodes) > 1), key=len, reverse=True)
    if len(large) > 1:
        shown = "; ".join(f"{len(nodes)} with {_names(topology, nodes, 2)}" for nodes in large[:4])
        said.append(f"{len(large)} islands: {shown}")
    if pins:
        said.append(f"{len(pins)} nodes are pinned")
    if not said:
        said = [f"{int((~both).sum() - len(both)) // 2} pairs have no link both ways"]
    return (
        f"no grid of {stages} stages x {slots} slots was found with all the links it needs "
        f"({', '.join(said)}); connect these nodes or choose a smaller grid"
    )


def _tables(topology: Topology, slots: int, sizes: tuple[float, float]) -> tuple[Floats, Floats]:
    return reduction_table(topology, slots, sizes[0]), hop_table(topology, sizes[1])


def _cost(topology: Topology, grid: Ints, sizes: tuple[float, float]) -> float:
    """The cost with each hop paired best."""
    reduce_s, hop_s = _tables(topology, grid.shape[1], sizes)
    finite_s = np.where(np.isfinite(hop_s), hop_s, 1e12)
    paired = grid_price(pair_hops(grid, finite_s), reduce_s, hop_s).total_s
    return min(paired, grid_price(grid, reduce_s, hop_s).total_s)


def _about_stage(topology: Topology, row: Ints, stage: int, rows_s: Floats) -> str:
    worst = int(row[rows_s.argmax()])
    places: dict[str, list[int]] = {}
    for node in sorted(row.tolist()):
        places.setdefault(topology.regions[node] if topology.regions else "", []).append(node)
    where = ", ".join(
        f"{place} ({_names(topology, nodes)})" if place else _names(topology, nodes)
        for place, nodes in sorted(places.items(), key=lambda item: (-len(item[1]), item[0]))
    )
    return (
        f"stage {stage}: {where}; exchange {rows_s.max():.4g} s (slowest {_name(topology, worst)})"
    )


def _about_hop(
    topology: Topology, grid: Ints, hops_s: Floats, sizes: tuple[float, float]
) -> list[str]:
    """The slowest hop, and what twice the bandwidth of its slowest pair would bring."""
    if not hops_s.size:
        return []
    hop, lane = np.unravel_index(int(hops_s.argmax()), hops_s.shape)
    a, b = int(grid[hop, lane]), int(grid[hop + 1, lane])
    speeds = topology.bytes_per_s.copy()
    speeds[a, b] *= 2.0
    speeds[b, a] *= 2.0
    faster = make_topology(topology.names, topology.latency_s, speeds, topology.regions)
    gain_s = _cost(topology, grid, sizes) - _cost(faster, grid, sizes)
    pair = f"{_name(topology, a)} - {_name(topology, b)}"
    about = (
        f"the slowest hop is {hop} -> {hop + 1}: {pair} takes {hops_s[hop, lane]:.4g} s of "
        f"{hops_s.max(axis=1).sum():.4g} s"
    )
    return [about, f"twice the bandwidth of {pair} would save {_saving(gain_s)}"]


def _about_twin(
    topology: Topology, grid: Ints, worst: int, sizes: tuple[float, float]
) -> list[str]:
    """One more node, as well linked as one of ours, in place of the one that bounds the stages."""
    stage = int(np.argwhere(grid == worst)[0, 0])
    near = [s for s in (stage, stage - 1, stage + 1) if 0 <= s < len(grid)]
    models = [int(node) for s in near for node in grid[s] if node != worst][:MAX_TWINS]
    if not models:
        return []
    now_s = _cost(topology, grid, sizes)
    costs_s = [_cost(_with_twin(topology, worst, model), grid, sizes) for model in models]
    best = int(np.argmin(costs_s))
    best_model, saving = _name(topology, models[best]), _saving(now_s - costs_s[best])
    about = f"one more node near {best_model}, in place of {_name(topology, worst)}"
    return [f"{about}, would save {saving}"]


def _saving(gain_s: float) -> str:
    return f"{gain_s:.3g} s" if gain_s > 1e-9 else "nothing: others are as slow"


def _with_twin(topology: Topology, goes: int, model: int) -> Topology:
    """The swarm with node `goes` replaced by one linked like `model`, near which it stands."""
    order = np.arange(topology.num_nodes)
    order[goes] = model
    latency_s = topology.latency_s[np.ix_(order, order)]
    speeds = topology.bytes_per_s[np.ix_(order, order)]
    others = np.delete(np.arange(topology.num_nodes), model)
    nearest = others[int(topology.bytes_per_s[model, others].argmax())]
    for a, b, there in ((goes, model, (model, nearest)), (model, goes, (nearest, model))):
        latency_s[a, b] = topology.latency_s[there]
        speeds[a, b] = topology.bytes_per_s[there]
    return make_topology(topology.names, latency_s, speeds, topology.regions)


def _name(topology: Topology, node: int) -> str:
    place = f" ({topology.regions[node]})" if topology.regions else ""
    return f"{topology.names[node]:.40}{place}"


def _names(topology: Topology, nodes: Ints | list[int], most: int = MAX_NAMES) -> str:
    shown = [f"{topology.names[int(node)]:.40}" for node in nodes[:most]]
    return " ".join(shown) + (f" and {len(nodes) - most} more" if len(nodes) > most else "")
