"""A training placement in words: why each node is where it is, what bounds the step, what helps."""

import numpy as np

from swarmnode.coordinator.cost import step_formula as on
from swarmnode.coordinator.cost.step_formula import Floats, Ints, Tables
from swarmnode.coordinator.cost.training import Step, step_of
from swarmnode.coordinator.solver.training import annealing as kernel
from swarmnode.coordinator.topology import Topology

GIB = 2.0**30
TWIN_MOVES = 50_000
"""A short search for what to give one more node."""


def words_about(topology: Topology, tables: Tables, grid: Ints, counts: Ints) -> tuple[str, ...]:
    """One line each: the step, its bottleneck, two things that would help, then every node."""
    step = step_of(grid, counts, tables)
    if not np.isfinite(step.total_s):
        return ("this placement overfills a node or needs a link that is missing",)
    lines = [_about_step(step), _about_bottleneck(topology, tables, step, grid)]
    lines.append(_about_more(topology, tables, step, grid, counts))
    if topology.num_nodes > 1:
        lines += _about_link(topology, tables, step, grid, counts)
    order = np.argsort(tables.flop_s, kind="stable")
    rank = {int(node): place + 1 for place, node in enumerate(order)}
    for node in sorted(set(grid.ravel().tolist())):
        lines.append(_about_node(topology, tables, step, grid, counts, node, rank[node]))
    idle = sorted(set(range(topology.num_nodes)) - set(grid.ravel().tolist()))
    if idle:
        lines.append(_about_idle(topology, idle))
    return tuple(lines)


def _about_step(step: Step) -> str:
    parts = step.seconds
    return (
        f"a step takes {step.total_s:.3g} s: pipelines {parts[on.PIPELINES_S]:.3g} s, exposed "
        f"reduction {parts[on.REDUCTION_S]:.3g} s, update {parts[on.APPLIED_S]:.3g} s, "
        f"coordinator {parts[on.WAIT_S]:.3g} s"
    )


def _about_bottleneck(topology: Topology, tables: Tables, step: Step, grid: Ints) -> str:
    slowest = int(step.column[on.END_S].argmax())
    if step.seconds[on.REDUCTION_S] > step.seconds[on.PIPELINES_S]:
        wire = step.machine[[on.SHARE_OUT_S, on.SHARE_IN_S]].max(axis=0)
        wire = wire + step.machine[[on.SUM_OUT_S, on.SUM_IN_S]].max(axis=0)
        node = int(np.where(np.isin(np.arange(wire.size), grid), wire, -1.0).argmax())
        return (
            f"bound by the reduction: {topology.names[node]} moves gradients for "
            f"{wire[node]:.3g} s; fewer slots on slow links or a smaller codec would help"
        )
    loads = step.machine[[on.COMPUTE_S, on.OUT_S, on.IN_S]][:, grid[:, slowest]]
    kind, stage = (int(x) for x in np.unravel_index(loads.argmax(), loads.shape))
    node, load = grid[stage, slowest], float(loads.max())
    what = ("compute", "uplink", "downlink")[kind]
    period = float(step.column[on.PERIOD_S, slowest])
    if period > 1.1 * load and tables.num_microbatches > 1:
        return (
            f"pipeline {slowest} is bound by its round trip: a period of {period:.3g} s, though "
            f"its busiest part ({topology.names[node]}, {what}) needs {load:.3g} s"
        )
    return (
        f"pipeline {slowest} is bound by the {what} of {topology.names[node]} in stage {stage}: "
        f"{load:.3g} s for each microbatch"
    )


def _about_node(
    topology: Topology, tables: Tables, step: Step, grid: Ints, counts: Ints, node: int, rank: int
) -> str:
    starts = np.concatenate(([0], np.cumsum(counts)))
    parts = []
    for s in range(len(grid)):
        copies = int((grid[s] == node).sum())
        if copies:
            plural = "s" if copies > 1 else ""
            layers = f"layers {starts[s]}-{starts[s + 1] - 1}"
            parts.append(f"{copies} slot{plural} of stage {s} ({layers})")
    busy = step.machine[on.COMPUTE_S, node]
    top = float(step.machine[on.COMPUTE_S, np.unique(grid)].max())
    used, room = step.machine[on.USED, node] / GIB, tables.room_bytes[node] / GIB
    why = f"no. {rank} in speed, computes {busy:.3g} of at most {top:.3g} s a round"
    tight = ", full" if used > 0.9 * room else ""
    return (
        f"{_name(topology, node)}: {' and '.join(parts)}; {why}, "
        f"{used:.1f} of {room:.1f} GiB{tight}{_about_reach(topology, grid, node)}"
    )


def _name(topology: Topology, node: int) -> str:
    region = f" in {topology.regions[node]}" if topology.regions else ""
    return f"{topology.names[node]}{region}"


def _about_reach(topology: Topology, grid: Ints, node: int) -> str:
    """The links that the node talks over."""
    others: set[int] = set()
    for s, v in np.argwhere(grid == node):
        near = [grid[k, v] for k in (s - 1, s + 1) if 0 <= k < len(grid)]
        others |= {int(other) for other in [*near, *grid[s]] if other != node}
    if not others:
        return ", talks to nobody"
    slowest = min(others, key=lambda other: (topology.bytes_per_s[node, other], other))
    rate = topology.bytes_per_s[node, slowest] * 8e-6
    return f", slowest link to {topology.names[slowest]} ({rate:.3g} Mbit/s)"


def _about_idle(topology: Topology, idle: list[int]) -> str:
    names = ", ".join(topology.names[node] for node in idle[:6])
    more = f" and {len(idle) - 6} more" if len(idle) > 6 else ""
    return f"without work: {names}{more}; the step would be longer with them, or a row is full"


def _about_more(topology: Topology, tables: Tables, step: Step, grid: Ints, counts: Ints) -> str:
    """What a twin of the fastest node would bring, with the changes that then help."""
    best = int(tables.flop_s.argmin())
    longer = with_twin(tables, best)
    count = len(longer.flop_s)
    found, layers = grid.copy(), counts.copy()
    scratch = kernel.Scratch(count, *grid.shape).arrays
    charge_s = np.zeros((2, count, len(grid)))
    starts = np.zeros(len(grid) + 1, dtype=np.int64)
    best_found, best_layers = found.copy(), layers.copy()
    now, word = np.full(3, step.total_s), np.array([1], dtype=np.uint64)
    kernel.anneal(
        found, layers, best_found, best_layers, now, word, longer, starts, charge_s, scratch,
        0, TWIN_MOVES, TWIN_MOVES, 0.003, 0.0,
    )  # fmt: skip
    seconds = min(
        step.total_s,
        kernel.descend(best_found, best_layers, longer, starts, charge_s, scratch),
    )
    saved = 100.0 * (1.0 - seconds / step.total_s)
    return f"one more node like {topology.names[best]}: {seconds:.3g} s a step ({saved:.0f} % less)"


def with_twin(tables: Tables, node: int) -> Tables:
    """The same swarm and one more machine with the speed and the links of `node`."""
    order = np.append(np.arange(len(tables.flop_s)), node)

    def link(matrix: Floats) -> Floats:
        longer = matrix[np.ix_(order, order)].copy()
        near = matrix[node].copy()
        near[node] = np.inf
        if len(near) > 1:  # the twins reach each other as fast as their fastest neighbour
            longer[node, -1] = longer[-1, node] = near.min()
        return np.ascontiguousarray(longer, dtype=np.float64)

    return tables._replace(
        flop_s=tables.flop_s[order],
        touch_s=tables.touch_s[order],
        room_bytes=tables.room_bytes[order],
        is_allowed=tables.is_allowed[order],
        wait_s=tables.wait_s[order],
        latency_s=link(tables.latency_s),
        forward_out_s=link(tables.forward_out_s),
        forward_in_s=link(tables.forward_in_s),
        backward_out_s=link(tables.backward_out_s),
        backward_in_s=link(tables.backward_in_s),
        reduce_out_s=link(tables.reduce_out_s),
        reduce_in_s=link(tables.reduce_in_s),
    )


def _about_link(
    topology: Topology, tables: Tables, step: Step, grid: Ints, counts: Ints
) -> list[str]:
    """What twice the bandwidth would bring on the link that is busiest in a step."""
    busy = link_seconds(tables, step, grid)
    if not busy.any():
        return []
    a, b = (int(x) for x in np.unravel_index(busy.argmax(), busy.shape))
    share = np.ones_like(busy)
    share[a, b] = share[b, a] = 0.5
    faster = tables._replace(
        forward_out_s=tables.forward_out_s * share,
        forward_in_s=tables.forward_in_s * share,
        backward_out_s=tables.backward_out_s * share,
        backward_in_s=tables.backward_in_s * share,
        reduce_out_s=tables.reduce_out_s * share,
        reduce_in_s=tables.reduce_in_s * share,
    )
    seconds = step_of(grid, counts, faster).total_s
    saved = 100.0 * (1.0 - seconds / step.total_s)
    return [
        (
            f"the busiest link is {topology.names[a]} -> {topology.names[b]}, "
            f"{busy[a, b]:.3g} s of sending in a step; twice as fast: "
            f"{seconds:.3g} s a step ({saved:.0f} % less)"
        )
    ]


def link_seconds(tables: Tables, step: Step, grid: Ints) -> Floats:
    """Seconds that each directed link (N, N) sends in a step."""
    busy = np.zeros_like(tables.latency_s)
    stages, slots = grid.shape
    for s in range(stages):
        shard = step.stage[on.OWN_WEIGHTS, s] / slots
        for v in range(slots):
            node = grid[s, v]
            for other in grid[s]:
                busy[node, other] += shard * tables.reduce_out_s[node, other]
            for other in np.unique(grid[s]):
                busy[node, other] += shard * tables.reduce_out_s[node, other]
            if s + 1 < stages:
                after = grid[s + 1, v]
                m = tables.num_microbatches
                busy[node, after] += m * tables.forward_out_s[node, after]
                busy[after, node] += m * tables.backward_out_s[after, node]
    return busy
