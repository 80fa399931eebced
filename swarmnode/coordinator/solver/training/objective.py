"""The `training` objective: seconds of a step on uneven machines, and the search."""

from collections.abc import Mapping, Sequence
from math import comb

import numpy as np

from swarmnode.coordinator.cost import step_formula as on
from swarmnode.coordinator.cost.needs import Workload, ranges_of
from swarmnode.coordinator.cost.step_formula import Floats, Ints
from swarmnode.coordinator.cost.training import Device, grid_of, price_of, step_of, tables_of
from swarmnode.coordinator.objective import (
    NOBODY,
    Arrangement,
    Bound,
    Effort,
    Found,
    Previous,
    Price,
    charged_s,
)
from swarmnode.coordinator.solver.training import annealing as kernel
from swarmnode.coordinator.solver.training.bound import step_bound
from swarmnode.coordinator.solver.training.first import (
    Start,
    cannot_fit,
    capacity_error,
    first_start,
    is_alike,
)
from swarmnode.coordinator.solver.training.layers import cheapest_split, limits_of, most_layers
from swarmnode.coordinator.solver.training.words import words_about
from swarmnode.coordinator.topology import Topology
from swarmnode.errors import CapacityError, DataError

MOST_TO_TRY_ALL = 200_000
"""Arrangements that are still looked at one by one."""
REPAIR_MOVES = 100_000
"""Tries to fit a grid into tight memory, where simple filling fails."""
COLD = ((0.5, 0.03), (0.9, 0.03), (0.5, 0.1))
"""(blend, heat) of the restarts from any state."""
WARM = ((0.0, 0.003), (0.5, 0.01), (0.9, 0.03))
"""The same from a placement that runs: it is left only for what is clearly better."""
FINAL_SHARE = 0.2
"""Of the moves, for a last cool run from the best of all."""
CHUNK_S = 0.1
"""Computing between two looks at `should_stop`, about."""
FORBIDDEN_S = 1e30
"""Charged for layers that may not change: more than any step takes, and finite."""
MOVE_S = 6e-8
"""Computing of one move for each slot, about."""


class TrainingObjective:
    """Predicted seconds of one training step.

    `pins` maps a node to the only stage that it may host; `coordinator` is the node that every
    step is reported to; `layers`, if given, stay as they are; at
    least `min_nodes` host something. Raises: DataError if the instance
    makes no sense.
    """

    name = "training"

    def __init__(
        self,
        topology: Topology,
        devices: Sequence[Device],
        workload: Workload,
        stages: int,
        slots: int,
        *,
        pins: Mapping[int, int] | None = None,
        coordinator: int | None = None,
        layers: tuple[tuple[int, int], ...] | None = None,
        min_nodes: int = 1,
    ) -> None:
        if not 1 <= stages <= workload.num_layers:
            raise CapacityError(
                f"the model has {workload.num_layers} layers, too few for {stages} stages; "
                "lower placement.stages"
            )
        for node, stage in sorted((pins or {}).items()):
            if not (0 <= node < topology.num_nodes and 0 <= stage < stages):
                raise DataError(f"node {node} is pinned to stage {stage}; there is no such pair")
        self.topology = topology
        self.devices = tuple(devices)
        self.workload = workload
        self.stages = stages
        self.slots = slots
        self.coordinator = coordinator
        self.pins = dict(pins or {})
        self.layers = layers
        self.tables = tables_of(
            topology,
            devices,
            workload,
            stages,
            slots,
            coordinator=coordinator,
            pins=pins,
            min_nodes=min(min_nodes, topology.num_nodes, stages * slots),
        )

    def price(self, arrangement: Arrangement) -> Price:
        """What `arrangement` costs; infinite if it overfills a node or needs a missing link."""
        step = step_of(*self._start(arrangement), self.tables)
        return price_of(step, self.tables.num_microbatches)

    def first(self, previous: Previous | None) -> Arrangement:
        """See Objective: live hosts stay, the rest goes where it would be done soonest.

        Raises: CapacityError with one line that says what is missing.
        """
        layers = self.workload.num_layers
        old = previous.arrangement if previous is not None else None
        if self.layers is not None and (old is None or old.layers != self.layers):
            old = Arrangement(((NOBODY,) * self.slots,) * self.stages, self.layers)
        start = first_start(self.tables, layers, self.stages, self.slots, old)
        start = start or self._repaired()
        found = None if start is None else arrangement_of(*start)
        if found is None or self.layers not in (None, found.layers):
            raise capacity_error(self.tables, layers, self.stages, self.slots)
        return found

    def charged_s(self, arrangement: Arrangement, previous: Previous | None) -> float:
        """See Objective."""
        return charged_s(arrangement, previous)

    def search(self, start: Arrangement, previous: Previous | None, effort: Effort) -> Found:
        """See Objective. Tiny instances are looked at completely, which is a proof."""
        run = _Run(self, previous, effort)
        if self._num_arrangements() <= MOST_TO_TRY_ALL:
            found = run.try_all()
            reasons = (f"all {self._num_arrangements()} arrangements were looked at",)
            proven = previous is None  # layers that change are charged more than others charge
            return self._not_worse(Found(found, run.moves_done, proven, reasons), start, previous)
        best, words = run.anneal_from(self._start(start))
        found = arrangement_of(*best)
        return self._not_worse(Found(found, run.moves_done, False, words), start, previous)

    def bound(self, effort: Effort) -> Bound:
        """See Objective; `effort` is not needed."""
        del effort
        return step_bound(self.tables, self.workload.num_layers, self.stages, self.slots)

    def explain(self, arrangement: Arrangement) -> tuple[str, ...]:
        """See Objective."""
        grid, counts = self._start(arrangement)
        return words_about(self.topology, self.tables, grid, counts)

    def _start(self, arrangement: Arrangement) -> Start:
        grid, counts = grid_of(arrangement)
        fits = grid.shape == (self.stages, self.slots) and counts.sum() == self.workload.num_layers
        if not fits or (counts < 1).any() or (grid >= self.topology.num_nodes).any():
            raise DataError(
                f"this placement is not {self.stages} stages x {self.slots} slots over "
                f"{self.workload.num_layers} layers and {self.topology.num_nodes} nodes"
            )
        return grid, counts

    def _not_worse(self, found: Found, start: Arrangement, previous: Previous | None) -> Found:
        def cost(arrangement: Arrangement) -> float:
            return self.price(arrangement).total_s + charged_s(arrangement, previous)

        if cost(found.arrangement) <= cost(start):
            return found
        return Found(start, found.moves_done, False, (*found.reasons, "nothing better was found"))

    def _num_arrangements(self) -> int:
        splits = comb(self.workload.num_layers - 1, self.stages - 1)
        return int(self.topology.num_nodes ** (self.stages * self.slots)) * splits

    def _repaired(self) -> Start | None:
        """Anything that fits, by a search for the least overflow; None if there is none, or we
        cannot find it."""
        if cannot_fit(self.tables, self.workload.num_layers, self.slots):
            return None
        run = _Run(self, None, Effort())
        if self._num_arrangements() <= MOST_TO_TRY_ALL:
            found = run.try_all()
            return None if not found.slots else grid_of(found)
        short, extra = divmod(self.workload.num_layers, self.stages)
        counts = np.array([short + (s < extra) for s in range(self.stages)], dtype=np.int64)
        order = np.argsort(-self.tables.room_bytes, kind="stable")
        grid = np.resize(order, (self.stages, self.slots)).astype(np.int64)
        word = np.array([run.seed_word(0)], dtype=np.uint64)
        left = kernel.repair(grid, counts, word, self.tables, run.scratch, REPAIR_MOVES)
        return (grid, counts) if left == 0.0 else None


def arrangement_of(grid: Ints, counts: Ints) -> Arrangement:
    """The arrangement of hosts (S, V) and numbers of layers (S,)."""
    return Arrangement(
        tuple(tuple(int(node) for node in row) for row in grid), ranges_of(counts.tolist())
    )


class _Run:
    """One search: its arrays, its randomness, its moves."""

    def __init__(
        self, objective: TrainingObjective, previous: Previous | None, effort: Effort
    ) -> None:
        self.objective = objective
        self.effort = effort
        self.moves_done = 0
        self.is_stopped = False
        stages, slots = objective.stages, objective.slots
        nodes = objective.topology.num_nodes
        self.is_warm = previous is not None
        self.old_starts, self.charge_s = _charges(objective, previous)
        self.scratch = kernel.Scratch(nodes, stages, slots).arrays
        self.chunk = max(200, int(CHUNK_S / (MOVE_S * stages * slots)))

    def seed_word(self, restart: int) -> int:
        """A state of the random word that is never 0, for one restart."""
        mixed = (self.effort.seed * 1_000_003 + restart + 1) * 0x9E3779B97F4A7C15
        return mixed % (1 << 64) or 1

    def try_all(self) -> Arrangement:
        """The best of all arrangements; one without slots if none fits."""
        objective = self.objective
        grid = np.zeros((objective.stages, objective.slots), dtype=np.int64)
        counts = np.ones(objective.stages, dtype=np.int64)
        first = counts.copy()
        first[-1] = objective.workload.num_layers - objective.stages + 1
        cost = kernel.try_all(
            first, grid, counts, objective.tables, self.old_starts, self.charge_s, self.scratch
        )
        self.moves_done = objective._num_arrangements()
        return arrangement_of(grid, counts) if np.isfinite(cost) else Arrangement((), ())

    def anneal_from(self, start: Start) -> tuple[Start, tuple[str, ...]]:
        """The best of several runs and a last cool one; each ends in a local optimum."""
        plans = WARM if self.is_warm else COLD
        moves = int(self.effort.moves * (1.0 - FINAL_SHARE)) // len(plans)
        best, best_cost = start, self.cost(start)
        winner = "the first answer"
        for restart, (blend, heat) in enumerate(plans):
            found, cost = self._anneal(start, moves, blend, heat, restart, best_cost)
            if cost < best_cost:
                best, best_cost, winner = found, cost, f"annealing with blend {blend}, heat {heat}"
            if self.is_stopped:
                break
        left = self.effort.moves - self.moves_done
        found, cost = self._anneal(best, left, 0.1, 0.003, len(plans), best_cost)
        if cost < best_cost:
            best, winner = found, f"{winner}, then cooled"
        stopped = ("stopped early",) if self.is_stopped else ()
        return best, (f"best of {len(plans)} searches: {winner}", *stopped)

    def cost(self, state: Start) -> float:
        """Price and charges of a state; infinite if it cannot be."""
        tables, scratch = self.objective.tables, self.scratch
        ok = kernel.evaluate(*state, tables, self.old_starts, self.charge_s, scratch)
        return float(scratch[3][on.TOTAL_S]) if ok else float("inf")

    def _anneal(
        self, start: Start, moves: int, blend: float, heat: float, restart: int, best_s: float
    ) -> tuple[Start, float]:
        grid, counts = start[0].copy(), start[1].copy()
        best = grid.copy(), counts.copy()
        self.cost(start)
        step = self.scratch[3]
        now = np.array([step[on.TOTAL_S], step[on.SMOOTH_S], step[on.TOTAL_S]])
        word = np.array([self.seed_word(restart)], dtype=np.uint64)
        done = 0
        while done < moves and not self.is_stopped:
            until = min(moves, done + self.chunk)
            kernel.anneal(
                grid, counts, *best, now, word, self.objective.tables, self.old_starts,
                self.charge_s, self.scratch, done, until, moves, heat, blend,
            )  # fmt: skip
            self.moves_done += until - done
            done = until
            share = self.moves_done / max(1, self.effort.moves)
            self.effort.report(share, min(best_s, float(now[kernel.BEST])))
            self.is_stopped = self.effort.should_stop()
        return self._polished(best)

    def _polished(self, state: Start) -> tuple[Start, float]:
        """Exact layers for the hosts, then every single change, until neither helps."""
        cost = self.cost(state)
        for _ in range(4):
            before = cost
            state, cost = self._better_layers(state, cost)
            grid, counts = state[0].copy(), state[1].copy()
            cost = min(cost, kernel.descend(
                grid, counts, self.objective.tables, self.old_starts, self.charge_s, self.scratch
            ))  # fmt: skip
            state = grid, counts
            if cost >= before or self.is_stopped:
                break
        return state, cost

    def _better_layers(self, state: Start, cost: float) -> tuple[Start, float]:
        """The best of the min-max splits for these hosts, over all limits of the slowest stage."""
        grid, counts = state
        layer_s, fixed_s, caps = _stage_times(self.objective, grid, counts)
        total = int(counts.sum())
        limits = limits_of(total, layer_s, fixed_s)
        tried: set[tuple[int, ...]] = set()
        best = state
        for limit in limits:
            split = cheapest_split(total, layer_s, most_layers(limit, layer_s, fixed_s, caps))
            if split is None or split in tried:
                continue
            tried.add(split)
            trial = grid, np.array(split, dtype=np.int64)
            trial_cost = self.cost(trial)
            if trial_cost < cost:
                best, cost = trial, trial_cost
        return best, cost


def _stage_times(
    objective: TrainingObjective, grid: Ints, counts: Ints
) -> tuple[Floats, Floats, Ints]:
    """Per stage (S,): seconds of one more layer on its busiest host, of all else that host does
    in a round, and the most layers that its hosts have room for while other stages stay."""
    tables, workload = objective.tables, objective.workload
    step = step_of(grid, counts, tables)
    num_stages = len(counts)
    one = tables.per_layer[0] * tables.flop_s, tables.per_layer[1] * tables.touch_s
    unit = np.maximum(*one)
    layer_s, fixed_s = np.zeros(num_stages), np.zeros(num_stages)
    caps = np.full(num_stages, workload.num_layers, dtype=np.int64)
    for s in range(num_stages):
        depth = num_stages - s + (tables.ahead if s + 1 < num_stages else 0)
        in_flight = min(depth, tables.num_microbatches)
        for node in np.unique(grid[s]):
            copies = int((grid[s] == node).sum())
            own_s = copies * unit[node]
            rest_s = max(0.0, step.machine[on.COMPUTE_S, node] - own_s * counts[s])
            if own_s + rest_s > layer_s[s] + fixed_s[s]:
                layer_s[s], fixed_s[s] = own_s, rest_s
            weights, kept = tables.per_layer[3], tables.per_layer[2]
            one_layer = weights * (tables.per_weight[0] + copies * tables.per_weight[1])
            one_layer += copies * kept * in_flight
            spare = tables.room_bytes[node] - step.machine[on.USED, node]
            caps[s] = min(caps[s], counts[s] + int(spare / max(one_layer, 1e-9)))
    return layer_s, fixed_s, caps


def _charges(objective: TrainingObjective, previous: Previous | None) -> tuple[Ints, Floats]:
    """Boundaries that run now, (S + 1,), and charges (2, N, S) as the kernel wants them.

    A stage that changes its layers must be fetched by its old hosts as well: they are charged
    what a newcomer is charged at most.
    """
    stages, nodes = objective.stages, objective.topology.num_nodes
    charge_s = np.zeros((2, nodes, stages))
    starts = np.zeros(stages + 1, dtype=np.int64)
    if objective.layers is not None:
        starts[:] = [*(start for start, _ in objective.layers), objective.workload.num_layers]
        charge_s[1] = FORBIDDEN_S
    if previous is None:
        return starts, charge_s
    old = previous.arrangement
    if previous.charge_s.shape == (nodes, stages):
        charge_s[0] += previous.charge_s
        charge_s[1] += previous.charge_s
    if objective.layers is None and is_alike(
        old, objective.workload.num_layers, stages, len(old.slots[0])
    ):
        starts[:] = [*(start for start, _ in old.layers), objective.workload.num_layers]
        for node in (node for node in old.nodes if node < nodes):
            charge_s[1, node] = charge_s[0].max(axis=0)
    return starts, charge_s
