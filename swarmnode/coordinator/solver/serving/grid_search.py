"""The search where columns of an S x V grid are the only chains: seeds, then annealing in runs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swarmnode.coordinator.cost.serving import ServingInstance, ServingRules
from swarmnode.coordinator.objective import NOBODY, Arrangement, Effort, Found, Previous
from swarmnode.coordinator.solver.serving.grid import anneal_grid, grid_cost
from swarmnode.coordinator.solver.serving.kernels import FAR, Tables
from swarmnode.coordinator.solver.serving.search import (
    BLURS,
    FIRST_MOVES,
    HEATS,
    MAX_RUNS,
    RUN_MOVES,
    TOLERANCE,
    make_tables,
    state_from,
)

Ints = NDArray[np.int64]
WORK_BETWEEN_ASKING = 10_000_000
"""Moves times nodes between two looks at should_stop: about 0.1 seconds."""


@dataclass(frozen=True, eq=False)
class GridSearch:
    """One search: instance, rules with a grid, fixed ends or none, pins, what ran before."""

    instance: ServingInstance
    rules: ServingRules
    ends: tuple[int, ...] | None
    pins: Mapping[int, int]
    previous: Previous | None
    top: float

    @property
    def _size(self) -> tuple[int, int]:
        assert self.rules.grid is not None
        return self.rules.grid

    def first(self) -> Arrangement | None:
        """The cheapest seed, or what a short search finds; None if nothing fits."""
        stages, slots = self._size
        crowded = any(
            list(self.pins.values()).count(stage) > slots for stage in set(self.pins.values())
        )
        if crowded or stages * slots > self.instance.num_nodes:
            return None
        if self.rules.max_hops is not None and stages > self.rules.max_hops:
            return None
        tables = self._tables()
        ways = self._seeds(tables)
        if ways[0][0] < FAR:
            return self._arrangement(ways[0][2], ways[0][3])
        start = self._arrangement(ways[0][2], ways[0][3])
        found = self.run(start, Effort(moves=FIRST_MOVES)).arrangement
        return found if self._total_s(*self._seat(found), tables) < FAR else None

    def run(self, start: Arrangement, effort: Effort) -> Found:
        """The best grid that is found; `start` itself if nothing is better."""
        tables = self._tables()
        seat, ends = self._seat(start)
        best, best_s = (seat, ends), self._total_s(seat, ends, tables)
        ways = [("start", seat, ends)] + [(n, s, e) for _t, n, s, e in self._seeds(tables)]
        num_runs = max(1, min(MAX_RUNS, effort.moves // RUN_MOVES))
        done, names = 0, []
        for run in range(num_runs):
            name, seat, ends = ways[run % len(ways)]
            heat, blur = HEATS[run % len(HEATS)], BLURS[run % len(BLURS)]
            if run > 0 and run == num_runs - 1:
                (seat, ends), name, heat, blur = best, "the best so far", 0.01, 0.05
            found, best_s, made = self._walk(
                (seat, ends), best, best_s, tables, effort, run, (done, num_runs), heat, blur
            )
            best, done = found, done + made
            names.append(name)
            if self._is_at_bound(best_s, tables) or effort.should_stop():
                break
        reason = f"annealing the grid from {', '.join(names)}: {done} moves"
        is_best = self._is_at_bound(best_s, tables)
        return Found(self._arrangement(*best), done, is_best, (reason,))

    def _walk(
        self,
        begin: tuple[Ints, Ints],
        best: tuple[Ints, Ints],
        best_s: float,
        tables: Tables,
        effort: Effort,
        run: int,
        span: tuple[int, int],
        heat: float,
        blur: float,
    ) -> tuple[tuple[Ints, Ints], float, int]:
        """One run in pieces, so that it can be stopped; the best, its cost, the moves made."""
        seat, ends = begin[0].copy(), begin[1].copy()
        best_seat, best_ends = best[0].copy(), best[1].copy()
        of_moves, made = effort.moves // span[1], 0
        piece = max(512, WORK_BETWEEN_ASKING // self.instance.num_nodes)
        state, is_free = state_from(effort.seed, run), self.ends is None
        while made < of_moves and not effort.should_stop():
            num = min(piece, of_moves - made)
            best_s = anneal_grid(
                seat, ends, best_seat, best_ends, best_s, self._size[1], self._stage_of(),
                is_free, tables, state, made, num, of_moves, blur, heat,
            )  # fmt: skip
            made += num
            effort.report(min(1.0, (span[0] + made) / max(1, effort.moves)), best_s)
            if self._is_at_bound(best_s, tables):
                break
        return (best_seat, best_ends), best_s, made

    def _tables(self) -> Tables:
        return make_tables(self.instance, self.rules, self.previous, self.top)

    def _is_at_bound(self, total_s: float, tables: Tables) -> bool:
        return tables.latency_weight == 0.0 and total_s <= (1.0 + TOLERANCE) / self.top

    def _total_s(self, seat: Ints, ends: Ints, tables: Tables) -> float:
        if self.rules.max_hops is not None and self._size[0] > self.rules.max_hops:
            return FAR
        return float(grid_cost(seat, ends, self._size[1], tables, 0.0).total_s)

    def _stage_of(self) -> Ints:
        stage_of = np.full(self.instance.num_nodes, -1, dtype=np.int64)
        for node, stage in self.pins.items():
            stage_of[node] = stage
        return stage_of

    def _seeds(self, tables: Tables) -> list[tuple[float, str, Ints, Ints]]:
        """The named starting points with what they cost, the cheapest first."""
        ways = []
        for name, seat, ends in self._all_seeds():
            pinned = self._obey_pins(seat)
            ways.append((self._total_s(pinned, ends, tables), name, pinned, ends))
        return sorted(ways, key=lambda way: way[0])

    def _all_seeds(self) -> Iterator[tuple[str, Ints, Ints]]:
        stages, slots = self._size
        splits = [np.array(self.ends, dtype=np.int64)] if self.ends else self._splits()
        previous = self.previous.arrangement if self.previous is not None else None
        if previous is not None and _is_grid(previous, stages, slots):
            seat, ends = self._seat(previous)
            yield "the previous grid", seat, ends if self.ends is None else splits[0]
        peak = self.instance.rate
        for ends in splits:
            size = int(np.diff(ends).max())
            by_speed = np.argsort(-peak[:, size], kind="stable").astype(np.int64)
            used = by_speed[: stages * slots]
            alike = used.reshape(slots, stages).T.reshape(-1)
            yield "alike nodes in a column", np.concatenate([alike, by_speed[len(used) :]]), ends
            yield "alike nodes in a stage", by_speed, ends

    def _splits(self) -> list[Ints]:
        """Equal stages, and stages as long as the roomiest, second roomiest ... node allows."""
        stages, slots = self._size
        num_layers = self.instance.num_layers
        equal = np.array([round(s * num_layers / stages) for s in range(stages + 1)], np.int64)
        most = [int(np.flatnonzero(row).max(initial=0)) for row in self.instance.rate]
        held = np.array(sorted(most, reverse=True)[: stages * slots], dtype=np.float64)
        share = np.maximum(held.reshape(stages, slots).min(axis=1), 0.5)
        ends = np.round(np.cumsum(share) / share.sum() * num_layers).astype(np.int64)
        by_room = np.concatenate([np.zeros(1, np.int64), ends])
        return [equal, by_room] if bool((np.diff(by_room) > 0).all()) else [equal]

    def _obey_pins(self, seat: Ints) -> Ints:
        """Swap every pinned node into its stage, in the place of one that is not pinned there."""
        slots = self._size[1]
        order = [int(node) for node in seat]
        for node, stage in sorted(self.pins.items()):
            row = range(stage * slots, (stage + 1) * slots)
            at = order.index(node)
            if at in row:
                continue
            to = next(p for p in row if self.pins.get(order[p]) != stage)
            order[at], order[to] = order[to], order[at]
        return np.array(order, dtype=np.int64)

    def _seat(self, arrangement: Arrangement) -> tuple[Ints, Ints]:
        """All nodes, those of the grid first; idle ones sit where nobody is, in order."""
        placed = {node for row in arrangement.slots for node in row if node != NOBODY}
        idle = [node for node in range(self.instance.num_nodes) if node not in placed]
        seat = []
        for row in arrangement.slots:
            seat += [node if node != NOBODY else idle.pop(0) for node in row]
        ends = [0, *(stop for _start, stop in arrangement.layers)]
        return np.array(seat + idle, dtype=np.int64), np.array(ends, dtype=np.int64)

    def _arrangement(self, seat: Ints, ends: Ints) -> Arrangement:
        stages, slots = self._size
        rows = [tuple(int(n) for n in seat[s * slots : (s + 1) * slots]) for s in range(stages)]
        layers = [(int(ends[s]), int(ends[s + 1])) for s in range(stages)]
        return Arrangement(tuple(rows), tuple(layers))


def _is_grid(arrangement: Arrangement, stages: int, slots: int) -> bool:
    """Whether a previous arrangement has this size and hosts nobody twice."""
    nodes = [node for row in arrangement.slots for node in row if node != NOBODY]
    is_whole = len(arrangement.slots) == stages and len(nodes) == len(set(nodes))
    return is_whole and all(len(row) == slots for row in arrangement.slots)
