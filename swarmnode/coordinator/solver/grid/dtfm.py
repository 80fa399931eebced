"""DT-FM's objective, plugged into the solver: first answer, search, proof, words."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from swarmnode.coordinator.cost.dtfm import (
    ACTIVATION_BYTES,
    GRADIENT_BYTES,
    as_grid,
    grid_price,
    hop_table,
    reduction_table,
)
from swarmnode.coordinator.objective import Arrangement, Bound, Effort, Found, Previous, Price
from swarmnode.coordinator.solver.grid import seeds
from swarmnode.coordinator.solver.grid.problem import GridProblem, finite_problem
from swarmnode.coordinator.solver.grid.takeover import take_over
from swarmnode.coordinator.topology import Topology
from swarmnode.errors import CapacityError, DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

EXACT_NODES = 16
FEW_TYPES = 16
TRIAL_MOVES = 1_000_000
"""Moves before a proof is tried: it is quicker if it knows a good grid."""
PROOF_EFFORT = 3.0
"""CP-SAT's deterministic time, about a second each."""
MOST_REGROUPED = 128
"""Slots; with more of them a cold search over the lanes finds better grids than one of stages."""
RESCUE_MOVES = 200_000
"""A first answer that uses a missing link is searched this long for one that does not."""


class DtfmObjective:
    """The cost of DT-FM on S stages x V slots; a node has one slot at most.

    pins: node -> the stage that it must be in. most_moved: how many nodes a repair may send to
    another stage, whatever the charges; None for no limit. Raises: CapacityError for fewer nodes
    than slots or too many pins in a stage, DataError for a pin or a size that makes no sense.
    """

    name = "dtfm"

    def __init__(
        self,
        topology: Topology,
        stages: int,
        slots: int,
        *,
        gradient_bytes: float = GRADIENT_BYTES,
        activation_bytes: float = ACTIVATION_BYTES,
        pins: Mapping[int, int] | None = None,
        most_moved: int | None = None,
    ) -> None:
        _check(topology, stages, slots, gradient_bytes, activation_bytes, pins or {})
        self.topology = topology
        self.stages, self.slots = stages, slots
        self.gradient_bytes, self.activation_bytes = gradient_bytes, activation_bytes
        self.reduce_s = reduction_table(topology, slots, gradient_bytes)
        self.hop_s = hop_table(topology, activation_bytes)
        self.pins, self.most_moved = dict(pins or {}), most_moved
        self._pin = np.full(topology.num_nodes, -1, dtype=np.int64)
        for node, stage in self.pins.items():
            self._pin[node] = stage
        self._proven_s = 0.0
        self._free = finite_problem(self.reduce_s, self.hop_s, self._pin, stages, slots)

    def price(self, arrangement: Arrangement) -> Price:
        """Seconds per iteration; inf if a link is missing."""
        return grid_price(as_grid(arrangement.slots), self.reduce_s, self.hop_s)

    def charged_s(self, arrangement: Arrangement, previous: Previous | None) -> float:
        """Each (node, stage) that is hosted, once: a node has one slot here."""
        if previous is None:
            return 0.0
        return self._free.charged(self._charges(previous)).charges_s(as_grid(arrangement.slots))

    def first(self, previous: Previous | None) -> Arrangement:
        """Newcomers on the seats of those who left, lanes drawn anew; else the best simple grid."""
        grids = []
        old = self._grid_of(previous)
        if previous is not None and old is not None:
            problem = self._free.charged(self._charges(previous))
            grids.append(take_over(problem, old))
        if not grids or not self._is_finite(grids[0]):
            grids += [self._free.polished(grid) for grid in self._seeds()]
        best = min(grids, key=self._free.cost) if len(grids) > 1 else grids[0]
        if not self._is_finite(best):
            best = self._anneal([best], self._free, Effort(moves=RESCUE_MOVES), from_cold=True)[0]
        self._refuse_infinite(best)
        return self._arrangement(best)

    def search(self, start: Arrangement, previous: Previous | None, effort: Effort) -> Found:
        """Exact up to 16 nodes; few types are proven if that is quick; else annealing."""
        problem = self._free.charged(self._charges(previous)) if previous else self._free
        if self.topology.num_nodes <= EXACT_NODES:
            return self._exact(problem, previous)
        starts, trial, reasons = [as_grid(start.slots)], 0, []
        from_cold = self._grid_of(previous) is None
        if from_cold:
            starts += self._seeds()
        if from_cold and not self.pins and previous is None and self._has_few_types():
            brief = _part_of(effort, 0, min(TRIAL_MOVES, effort.moves))
            grid, trial = self._anneal(starts, problem, brief, from_cold=True)
            grid, is_proven, why = self._prove(grid)
            if is_proven:
                return Found(self._arrangement(grid), trial, True, (why,))
            starts, reasons = [grid, *starts], [why]
        rest = _part_of(effort, trial, effort.moves - trial)
        best, moves = self._anneal(starts, problem, rest, from_cold=from_cold)
        self._refuse_infinite(best)
        reasons.append(self._how(trial + moves, effort, from_cold))
        return Found(self._arrangement(best), trial + moves, reasons=tuple(reasons))

    def bound(self, effort: Effort) -> Bound | None:
        """The better of the threshold argument and what a proof over types has left open."""
        from swarmnode.coordinator.bounds import grid_bound

        if effort.should_stop() and self._proven_s > 0:
            return Bound(self._proven_s, "a constraint program over the types of nodes")
        bound = grid_bound(self.reduce_s, self.hop_s, self.stages, self.slots)
        if self._proven_s > bound.seconds:
            return Bound(self._proven_s, "a constraint program over the types of nodes")
        return bound

    def explain(self, arrangement: Arrangement) -> tuple[str, ...]:
        """A line for each stage, then what bounds the cost and what would lower it."""
        from swarmnode.coordinator.solver.grid.words import words_about

        return words_about(
            self.topology, self.gradient_bytes, self.activation_bytes, as_grid(arrangement.slots)
        )

    def _exact(self, problem: GridProblem, previous: Previous | None) -> Found:
        from swarmnode.coordinator.solver.grid.exact import exact_grid

        found = exact_grid(
            self.reduce_s, self.hop_s, self.stages, self.slots,
            charge_s=problem.charge_s if previous else None, pins=self.pins,
        )  # fmt: skip
        if found is None:
            raise CapacityError(self._what_is_missing())
        return Found(
            self._arrangement(as_grid(found.slots)), 0, True,
            ("every arrangement was ruled out or looked at",),
        )  # fmt: skip

    def _prove(self, grid: Ints) -> tuple[Ints, bool, str]:
        """Try to prove, or beat, `grid` by counting types."""
        from swarmnode.coordinator.solver.grid.aggregate import aggregate_grid

        known_s = grid_price(grid, self.reduce_s, self.hop_s).total_s
        answer = aggregate_grid(
            self.reduce_s, self.hop_s, self.stages, self.slots, known_cost_s=known_s,
            hint=grid.tolist() if np.isfinite(known_s) else None, effort=PROOF_EFFORT,
        )  # fmt: skip
        self._proven_s = max(self._proven_s, answer.bound_s * (1 - 1e-9))
        if answer.slots is not None:
            grid = as_grid(answer.slots)
        is_proven = answer.is_optimal and np.isfinite(answer.cost_s)
        said = "proves this the best" if is_proven else f"shows at least {answer.bound_s:.4g} s"
        return grid, is_proven, f"a constraint program over the types of nodes {said}"

    def _has_few_types(self) -> bool:
        from swarmnode.coordinator.solver.grid.types import group_nodes

        return len(group_nodes(self.reduce_s, self.hop_s)) <= FEW_TYPES

    def _anneal(
        self, starts: Sequence[Ints], problem: GridProblem, effort: Effort, *, from_cold: bool
    ) -> tuple[Ints, int]:
        from swarmnode.coordinator.solver.grid.portfolio import Budget, search_grids
        from swarmnode.coordinator.solver.grid.repair import repair_grids
        from swarmnode.coordinator.solver.grid.tournament import search_stages

        budget = Budget(effort)
        if not from_cold:
            return repair_grids(problem, starts, budget, self.most_moved), budget.spent
        if self.stages * self.slots <= MOST_REGROUPED:
            return search_stages(problem, starts, budget), budget.spent
        return search_grids(problem, starts, budget), budget.spent

    def _seeds(self) -> list[Ints]:
        shape = (self.stages, self.slots)
        nodes = seeds.usable_nodes(self._free.hop_s, self.stages * self.slots, self._pin)
        grids = [
            seeds.pipelines_together(nodes, self._free.hop_s, *shape),
            seeds.stages_together(nodes, self._free.hop_s, *shape),
            seeds.greedy(nodes, self._free.reduce_s, *shape),
        ]
        return [seeds.obey(grid, self._pin) for grid in grids]

    def _charges(self, previous: Previous) -> Floats:
        charge_s = np.asarray(previous.charge_s, dtype=np.float64)
        shape = (self.topology.num_nodes, self.stages)
        if charge_s.shape != shape and self._grid_of(previous) is None:
            return np.zeros(shape)  # those charges are for a grid of another shape
        if charge_s.shape != shape or not (np.isfinite(charge_s) & (charge_s >= 0)).all():
            raise DataError(f"the charges are {charge_s.shape}, want {shape} of seconds >= 0")
        return np.ascontiguousarray(charge_s)

    def _grid_of(self, previous: Previous | None) -> Ints | None:
        """The earlier grid, NOBODY where a seat is free; None if its shape was another."""
        if previous is None:
            return None
        old = previous.arrangement
        widths = {len(row) for row in old.slots}
        if len(old.slots) != self.stages or widths != {self.slots} or old.layers != self._layers:
            return None
        return as_grid(old.slots)

    @property
    def _layers(self) -> tuple[tuple[int, int], ...]:
        """DT-FM gives every stage the same; what each has is counted as one."""
        return tuple((stage, stage + 1) for stage in range(self.stages))

    def _arrangement(self, grid: Ints) -> Arrangement:
        return Arrangement(tuple(tuple(int(n) for n in row) for row in grid), self._layers)

    def _is_finite(self, grid: Ints) -> bool:
        return bool(np.isfinite(grid_price(grid, self.reduce_s, self.hop_s).total_s))

    def _refuse_infinite(self, grid: Ints) -> None:
        if not self._is_finite(grid):
            raise CapacityError(self._what_is_missing())

    def _what_is_missing(self) -> str:
        from swarmnode.coordinator.solver.grid.words import missing_links

        return missing_links(self.topology, self.stages, self.slots, self.pins)

    def _how(self, moves: int, effort: Effort, from_cold: bool) -> str:
        began = "simple grids, folded and random ones" if from_cold else "the running placement"
        stopped = " (stopped)" if moves < effort.moves else ""
        return f"annealed {moves} moves from {began}, seed {effort.seed}{stopped}"


def _part_of(effort: Effort, done: int, moves: int) -> Effort:
    """An effort of `moves` inside of another, whose report goes on where `done` moves ended."""
    whole = max(1, effort.moves)

    def report(share: float, best_s: float) -> None:
        effort.report((done + share * moves) / whole, best_s)

    return Effort(moves, effort.seed + done, effort.should_stop, report)


def _check(
    topology: Topology, stages: int, slots: int, gradient_bytes: float, activation_bytes: float,
    pins: Mapping[int, int],
) -> None:  # fmt: skip
    if stages < 1 or slots < 1:
        raise DataError(f"a grid of {stages} stages x {slots} slots; give at least 1 of each")
    for what, size in (("gradient", gradient_bytes), ("activation", activation_bytes)):
        if not (np.isfinite(size) and size >= 0):
            raise DataError(f"the {what} size is {size} bytes; give a number of at least 0")
    if topology.num_nodes < stages * slots:
        raise CapacityError(
            f"{topology.num_nodes} nodes for {stages} stages x {slots} slots; "
            f"{stages * slots - topology.num_nodes} more are needed, or a smaller grid"
        )
    for node, stage in pins.items():
        if not (0 <= node < topology.num_nodes and 0 <= stage < stages):
            raise DataError(
                f"a pin of node {node} to stage {stage}; there are {topology.num_nodes} nodes "
                f"and {stages} stages, counted from 0"
            )
    for stage in range(stages):
        if (count := sum(at == stage for at in pins.values())) > slots:
            raise CapacityError(
                f"{count} nodes are pinned to stage {stage}, which has {slots} slots"
            )
