"""Proofs for swarms with few types of nodes: a constraint program that counts instead of naming.

Interchangeable nodes are one type, so the program decides how many nodes of a type each stage has
and how many pairs of two types each hop carries. Which node goes where is filled in afterwards.
Costs become whole ticks, always rounded down: what is proven in ticks holds in seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from ortools.sat.python import cp_model

from swarmnode.coordinator.solver.grid.types import TypedCosts, group_nodes, typed_costs
from swarmnode.errors import CapacityError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Slots = tuple[tuple[int, ...], ...]
MAX_TYPES = 16
"""Above this the program proves nothing of use in seconds."""
TICKS = 10_000_000
"""Into how many ticks the scale of the costs is cut: a proof is exact to about 2e-6."""
OPEN = 1e-5
"""A gap below this share is the rounding and not a better arrangement."""


@dataclass(frozen=True)
class Aggregated:
    """What the program found and proved."""

    slots: Slots | None
    """None if it found no arrangement that is as good as the known one."""
    cost_s: float
    """The real cost of `slots`, or what was known before."""
    bound_s: float
    """No grid costs less."""
    is_optimal: bool
    """Whether `cost_s` is proven to be the least, up to rounding."""


@dataclass(frozen=True)
class _Program:
    """The model with the variables that the answer is read from."""

    model: cp_model.CpModel
    counts: list[list[cp_model.IntVar]]
    """[stage][type]."""
    flows: list[list[list[cp_model.IntVar]]]
    """[hop][type before][type after]."""
    objective: cp_model.LinearExpr


def aggregate_grid(
    reduce_s: Floats,
    hop_s: Floats,
    num_stages: int,
    num_slots: int,
    *,
    known_cost_s: float = np.inf,
    hint: Sequence[Sequence[int]] | None = None,
    effort: float = 5.0,
) -> Aggregated:
    """The best grid of a swarm with few types of nodes, and a proof of how good it is.

    effort: CP-SAT's deterministic time, about a second each; the answer does not depend on the
    machine. known_cost_s: what some grid costs; `hint` is such a grid, rows are stages.
    Shapes: (N, N), inf for no link, hop_s symmetric.
    Raises: CapacityError for more than MAX_TYPES types or too few nodes.
    """
    typed = typed_costs(reduce_s, hop_s)
    if typed.num_types > MAX_TYPES or len(reduce_s) < num_stages * num_slots:
        raise CapacityError(
            f"{len(reduce_s)} nodes of {typed.num_types} types for {num_stages} x {num_slots} "
            f"slots; the proof needs a node for each slot and at most {MAX_TYPES} types"
        )
    tick_s = _tick_s(typed, num_stages, num_slots, known_cost_s)
    program = _build(typed, num_stages, num_slots, tick_s)
    if np.isfinite(known_cost_s):
        program.model.add(program.objective <= int(known_cost_s / tick_s) + 1)
    if hint is not None:
        _give_hint(program, typed, hint)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.catch_sigint_signal = False  # Ctrl-C belongs to whoever asked
    solver.parameters.random_seed = 0
    solver.parameters.max_deterministic_time = effort
    status = solver.solve(program.model)
    if status == cp_model.INFEASIBLE:
        return Aggregated(None, known_cost_s, known_cost_s, True)
    bound_s = max(0.0, min(solver.best_objective_bound * tick_s, known_cost_s))
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Aggregated(None, known_cost_s, bound_s, bound_s >= known_cost_s * (1 - OPEN))
    slots = _decode(solver, program, typed)
    cost_s = _grid_cost(reduce_s, hop_s, slots)
    if cost_s > known_cost_s:  # by the rounding at most: what was known is as good
        return Aggregated(None, known_cost_s, bound_s, bound_s >= known_cost_s * (1 - OPEN))
    return Aggregated(slots, cost_s, min(bound_s, cost_s), bound_s >= cost_s * (1 - OPEN))


def _tick_s(typed: TypedCosts, num_stages: int, num_slots: int, known_cost_s: float) -> float:
    """Seconds in a tick: the known cost, or the dearest that a grid could be, over TICKS."""
    if 0 < known_cost_s < np.inf:
        return known_cost_s / TICKS
    dearest = [float(c[np.isfinite(c)].max(initial=0)) for c in (typed.reduce_s, typed.hop_s)]
    return max(dearest[0] * (num_slots - 1) + dearest[1] * (num_stages - 1), 1e-12) / TICKS


def _ticks(cost_s: Floats, tick_s: float) -> Ints:
    """Rounded down, and once more against the division's own error; -1 for no link."""
    whole = np.floor(np.where(np.isfinite(cost_s), cost_s, 0.0) / tick_s * (1 - 1e-12))
    # A link far above the known cost is never used; its exact price would only overflow.
    return np.where(np.isfinite(cost_s), np.minimum(whole, 4.0 * TICKS), -1).astype(np.int64)


def _build(typed: TypedCosts, num_stages: int, num_slots: int, tick_s: float) -> _Program:
    model = cp_model.CpModel()
    rooms = [min(len(nodes), num_slots) for nodes in typed.members]
    counts = [[model.new_int_var(0, room, "") for room in rooms] for _ in range(num_stages)]
    for stage in counts:
        model.add(sum(stage) == num_slots)
    for kind, nodes in enumerate(typed.members):
        model.add(sum(stage[kind] for stage in counts) <= len(nodes))
    dearest = _add_reductions(model, counts, _ticks(typed.reduce_s, tick_s), rooms)
    flows, hops = _add_hops(model, counts, _ticks(typed.hop_s, tick_s), num_slots)
    _break_symmetry(model, counts, typed)
    objective = dearest + sum(hops)
    model.minimize(objective)
    return _Program(model, counts, flows, objective)


def _add_reductions(
    model: cp_model.CpModel, counts: list[list[cp_model.IntVar]], costs: Ints, rooms: list[int]
) -> cp_model.IntVar:
    """The dearest row sum: at least that of every type that a stage has."""
    top = [int((np.maximum(row, 0) * rooms).sum()) for row in costs]
    dearest = model.new_int_var(0, max(top), "")
    for stage in counts:
        present = [model.new_bool_var("") for _ in stage]
        for kind, count in enumerate(stage):
            model.add(count <= rooms[kind] * present[kind])
            model.add(count >= present[kind])
            if costs[kind, kind] < 0:
                model.add(count <= 1)
            for other in np.flatnonzero(np.delete(costs[kind], kind) < 0):
                other = int(other) + (other >= kind)
                model.add(present[kind] + present[other] <= 1)
            row = sum(int(max(c, 0)) * n for c, n in zip(costs[kind], stage, strict=True))
            itself = int(max(costs[kind, kind], 0))
            model.add(dearest >= row - itself - top[kind] * (1 - present[kind]))
    return dearest


def _add_hops(
    model: cp_model.CpModel, counts: list[list[cp_model.IntVar]], costs: Ints, num_slots: int
) -> tuple[list[list[list[cp_model.IntVar]]], list[cp_model.LinearExpr]]:
    """The pairs of every hop, and its cost: the level that its dearest pair is at.

    A hop climbs the levels one by one and pays each step; pairs at or above a level that was not
    climbed are none. That says more to a linear relaxation than a bound for each pair.
    """
    kinds = range(len(costs))
    levels = [0, *(int(level) for level in np.unique(costs[costs > 0]))]
    flows, hops = [], []
    for before, after in pairwise(counts):
        flow = [[model.new_int_var(0, num_slots, "") for _ in kinds] for _ in kinds]
        for a in kinds:
            model.add(sum(flow[a]) == before[a])
            model.add(sum(row[a] for row in flow) == after[a])
        model.add(sum(flow[a][b] for a in kinds for b in kinds if costs[a, b] < 0) == 0)
        climbed = [model.new_bool_var("") for _ in levels[1:]]
        for low, high in pairwise(climbed):
            model.add_implication(high, low)
        for level, step in zip(levels[1:], climbed, strict=True):
            dear = [flow[a][b] for a in kinds for b in kinds if costs[a, b] >= level]
            model.add(sum(dear) <= num_slots * step)
        steps = [high - low for low, high in pairwise(levels)]
        hops.append(sum(step * did for step, did in zip(steps, climbed, strict=True)))
        flows.append(flow)
    return flows, hops


def _break_symmetry(
    model: cp_model.CpModel, counts: list[list[cp_model.IntVar]], typed: TypedCosts
) -> None:
    """Of arrangements that are mirror images, or swap whole look-alike types, keep one.

    The mirror is chosen by what look-alike types have in common, so both rules hold at once.
    """
    classes = _alike_types(typed)
    number = {kind: at for at, alike in enumerate(classes) for kind in alike}
    first, last = (
        sum(number[kind] * count for kind, count in enumerate(stage))
        for stage in (counts[0], counts[-1])
    )
    model.add(first <= last)
    for alike in classes:
        for one, other in pairwise(alike):
            model.add(counts[0][one] >= counts[0][other])


def _alike_types(typed: TypedCosts) -> list[list[int]]:
    """Types that could swap as a whole, as identical boxes can."""
    classes: dict[tuple[int, int, float, float], list[int]] = {}
    for at, alike in enumerate(group_nodes(typed.reduce_s, typed.hop_s, tolerance=0.0)):
        for kind in alike:
            within = float(typed.reduce_s[kind, kind]), float(typed.hop_s[kind, kind])
            classes.setdefault((at, len(typed.members[kind]), *within), []).append(kind)
    return list(classes.values())


def _give_hint(program: _Program, typed: TypedCosts, hint: Sequence[Sequence[int]]) -> None:
    kind_of = {node: kind for kind, nodes in enumerate(typed.members) for node in nodes}
    rows = [[kind_of[node] for node in row] for row in hint]
    for stage, row in zip(program.counts, rows, strict=True):
        for kind, count in enumerate(stage):
            program.model.add_hint(count, row.count(kind))
    for hop, (before, after) in enumerate(pairwise(rows)):
        pairs = list(zip(before, after, strict=True))
        for a, flow in enumerate(program.flows[hop]):
            for b, count in enumerate(flow):
                program.model.add_hint(count, pairs.count((a, b)))


def _decode(solver: cp_model.CpSolver, program: _Program, typed: TypedCosts) -> Slots:
    """Name the nodes: the first stage in order, every later one by the pairs of its hop."""
    idle = [list(nodes) for nodes in typed.members]
    kinds = [k for k, n in enumerate(program.counts[0]) for _ in range(solver.value(n))]
    rows = [[idle[kind].pop(0) for kind in kinds]]
    for flow in program.flows:
        after = [[b for b, n in enumerate(row) for _ in range(solver.value(n))] for row in flow]
        kinds = [after[kind].pop(0) for kind in kinds]
        rows.append([idle[kind].pop(0) for kind in kinds])
    return tuple(tuple(row) for row in rows)


def _grid_cost(reduce_s: Floats, hop_s: Floats, slots: Slots) -> float:
    """The objective of a grid whose columns are its pipelines."""
    rows = [np.asarray(row, dtype=np.intp) for row in slots]
    own = [reduce_s[np.ix_(row, row)] for row in rows]
    sums = [np.where(np.eye(len(table), dtype=bool), 0.0, table).sum(axis=1).max() for table in own]
    hops = [hop_s[before, after].max() for before, after in pairwise(rows)]
    return float(max(sums) + sum(hops))
