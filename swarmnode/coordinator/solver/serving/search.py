"""The search over free ranges: seeds, all combinations where they are few, annealing in runs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from swarmnode.coordinator.cost.serving import ServingInstance, ServingRules, held_ranges
from swarmnode.coordinator.objective import NOBODY, Arrangement, Effort, Found, Previous
from swarmnode.coordinator.solver.serving.annealing import anneal, try_all
from swarmnode.coordinator.solver.serving.kernels import (
    FAR,
    Tables,
    cost_of,
    make_room,
)
from swarmnode.coordinator.solver.serving.seeds import Ranges, cover, seeds
from swarmnode.coordinator.topology import Matrix

MOST_COMBINATIONS = 200_000
"""Up to here all are tried: well below a second."""
WORK_BETWEEN_ASKING = 12_000_000
"""Moves times nodes squared between two looks at should_stop: about 0.2 seconds at most."""
RUN_MOVES = 200_000
MAX_RUNS = 16
FIRST_MOVES = 20_000
HEATS = (0.05, 0.1, 0.02)
BLURS = (0.3, 0.5, 0.1, 0.7)
TOLERANCE = 1e-9


def make_tables(
    instance: ServingInstance, rules: ServingRules, previous: Previous | None, top: float
) -> Tables:
    """The instance, the rules and the charges as the kernels read them."""
    old, each_s = charge_by_node(instance, previous)
    most = [int(np.flatnonzero(row).max(initial=0)) for row in instance.rate]
    limit_s = -1.0 if rules.max_latency_s is None else rules.max_latency_s * (1.0 + 1e-12)
    return Tables(
        rate=np.ascontiguousarray(instance.rate),
        link=np.ascontiguousarray(instance.link_tokens_per_s),
        latency=np.ascontiguousarray(instance.latency_s),
        source=np.ascontiguousarray(instance.source_tokens_per_s),
        sink=np.ascontiguousarray(instance.sink_tokens_per_s),
        layer_s=np.ascontiguousarray(instance.layer_s),
        most=np.array(most, dtype=np.int64),
        old_start=np.ascontiguousarray(old[:, 0]),
        old_stop=np.ascontiguousarray(old[:, 1]),
        charge=each_s,
        num_layers=instance.num_layers,
        partial=rules.partial,
        max_hops=rules.max_hops or 0,
        max_latency_s=float(limit_s),
        latency_weight=float(rules.latency_weight),
        top=float(top),
    )


def charge_by_node(instance: ServingInstance, previous: Previous | None) -> tuple[Ranges, Matrix]:
    """By node: the range that it holds now, and what each layer beyond it costs, in seconds.

    Shapes: (N, 2), (N,). A node that held nothing is free.
    """
    count = instance.num_nodes
    old, each_s = np.zeros((count, 2), dtype=np.int64), np.zeros(count)
    if previous is None:
        return old, each_s
    layers = previous.arrangement.layers
    for (start, stop), row in zip(layers, previous.arrangement.slots, strict=True):
        for node in row:
            if node != NOBODY:
                old[node] = start, stop
    sizes = np.array([stop - start for start, stop in layers], dtype=np.float64)
    if layers:
        each_s = np.where(old[:, 1] > old[:, 0], (previous.charge_s / sizes).max(axis=1), 0.0)
    return old, np.ascontiguousarray(each_s)


def state_from(seed: int, run: int) -> NDArray[np.uint64]:
    """A state for the kernels' generator; never zero."""
    mixed = np.random.SeedSequence([seed & (2**63 - 1), run]).generate_state(1, np.uint64)
    return np.asarray(mixed | np.uint64(1), dtype=np.uint64)


@dataclass(frozen=True, eq=False)
class RangeSearch:
    """One search: instance, rules, pinned ranges, what ran before, and the bound."""

    instance: ServingInstance
    rules: ServingRules
    pins: Mapping[int, tuple[int, int]]
    previous: Previous | None
    top: float

    def first(self) -> Arrangement | None:
        """The cheapest valid start, or None if neither seeds nor a short search finds any."""
        tables = make_tables(self.instance, self.rules, self.previous, self.top)
        ways = [ranges for total_s, _name, ranges in self._seeds(tables) if total_s < FAR]
        if ways:
            return self._arrangement(ways[0])
        idle = self._arrangement(np.zeros((self.instance.num_nodes, 2), dtype=np.int64))
        found = self.run(idle, Effort(moves=FIRST_MOVES)).arrangement
        return found if self._total_s(self._ranges(found), tables) < FAR else None

    def run(self, start: Arrangement, effort: Effort) -> Found:
        """The best that is found; `start` itself if nothing is better."""
        tables = make_tables(self.instance, self.rules, self.previous, self.top)
        options = self._options()
        combinations = prod(len(choices) for choices in options)
        if combinations <= MOST_COMBINATIONS:
            return self._try_all(options, combinations, tables, effort)
        return self._anneal(self._ranges(start), tables, effort)

    def _anneal(self, start: Ranges, tables: Tables, effort: Effort) -> Found:
        """Runs from the start, the seeds and last the best; each run is cooled on its own."""
        best, best_s = start.copy(), self._total_s(start, tables)
        num_runs = max(1, min(MAX_RUNS, effort.moves // RUN_MOVES))
        ways = [("start", start)] + [(name, r) for _s, name, r in self._seeds(tables)]
        done, names, is_best = 0, list[str](), self._is_at_bound(best_s, tables)
        for run in range(0 if is_best else num_runs):
            name, begin = ways[run % len(ways)]
            heat, blur = HEATS[run % len(HEATS)], BLURS[run % len(BLURS)]
            if run > 0 and run == num_runs - 1:
                name, begin, heat, blur = "the best so far", best, 0.01, 0.05
            walk = _Walk(begin, best, best_s, state_from(effort.seed, run))
            of_moves = effort.moves // num_runs
            done += self._walk(walk, tables, effort, (done, of_moves), heat, blur)
            best, best_s = walk.best, walk.best_s
            names.append(name)
            is_best = self._is_at_bound(best_s, tables)
            if is_best or effort.should_stop():
                break
        reasons = [f"annealing from {', '.join(names) or 'nothing'}: {done} moves"]
        if is_best:
            reasons.append(f"it reaches the bound of {self.top:.2f} tokens/s, so nothing is better")
        return Found(self._arrangement(best), done, is_best, tuple(reasons))

    def _walk(
        self,
        walk: "_Walk",
        tables: Tables,
        effort: Effort,
        span: tuple[int, int],
        heat: float,
        blur: float,
    ) -> int:
        """One run in pieces, so that it can be stopped; how many moves were made."""
        before, of_moves = span
        room = make_room(self.instance.num_nodes, self.instance.num_layers)
        fixed = np.zeros(self.instance.num_nodes, dtype=np.bool_)
        fixed[list(self.pins)] = True
        piece, made = max(64, WORK_BETWEEN_ASKING // self.instance.num_nodes**2), 0
        now = walk.start.copy()
        starts, stops = now[:, 0].copy(), now[:, 1].copy()
        best_start, best_stop = walk.best[:, 0].copy(), walk.best[:, 1].copy()
        while made < of_moves and not effort.should_stop():
            num = min(piece, of_moves - made)
            walk.best_s = anneal(
                starts, stops, best_start, best_stop, walk.best_s, fixed, tables, room,
                walk.state, made, num, of_moves, blur, heat,
            )  # fmt: skip
            made += num
            effort.report(min(1.0, (before + made) / max(1, effort.moves)), walk.best_s)
            if self._is_at_bound(walk.best_s, tables):
                break
        walk.best = np.column_stack([best_start, best_stop])
        return made

    def _is_at_bound(self, total_s: float, tables: Tables) -> bool:
        """Whether nothing can be better; with a price on latency nobody knows."""
        if tables.latency_weight > 0.0:
            return False
        return total_s <= (1.0 + TOLERANCE) / self.top

    def _try_all(
        self, options: list[list[tuple[int, int]]], count: int, tables: Tables, effort: Effort
    ) -> Found:
        """Price every combination of ranges: the answer is optimal unless somebody stops it."""
        room = make_room(self.instance.num_nodes, self.instance.num_layers)
        table = np.zeros((len(options), max(map(len, options)), 2), dtype=np.int64)
        for node, choices in enumerate(options):
            table[node, : len(choices)] = choices
        sizes = np.array([len(choices) for choices in options], dtype=np.int64)
        turn, best = np.zeros(len(options), dtype=np.int64), np.zeros((len(options), 2), np.int64)
        best_s, done, piece = FAR, 0, 100_000
        while done < count and not effort.should_stop():
            num = min(piece, count - done)
            best_s = try_all(table, sizes, turn, best, best_s, num, tables, room)
            done += num
            effort.report(done / count, best_s)
        reason = f"{done} of {count} combinations of ranges tried"
        return Found(self._arrangement(best), done, done == count, (reason,))

    def _options(self) -> list[list[tuple[int, int]]]:
        """By node: idle, and every range that fits; a pinned node has no choice."""
        num_layers = self.instance.num_layers
        options = []
        for node, rates in enumerate(self.instance.rate):
            sizes = [int(k) for k in np.flatnonzero(rates) if 1 <= k <= num_layers]
            ranges = [(a, a + k) for k in sizes for a in range(num_layers - k + 1)]
            options.append([self.pins[node]] if node in self.pins else [(0, 0), *ranges])
        return options

    def _seeds(self, tables: Tables) -> list[tuple[float, str, Ranges]]:
        """The named starting points with what they cost, the cheapest first."""
        ways = []
        for name, ranges in self._all_seeds():
            for node, pin in self.pins.items():
                ranges[node] = pin
            ways.append((self._total_s(ranges, tables), name, ranges))
        return sorted(ways, key=lambda way: way[0])

    def _all_seeds(self) -> Iterator[tuple[str, Ranges]]:
        if self.previous is not None:
            old, _each_s = charge_by_node(self.instance, self.previous)
            for node, (start, stop) in enumerate(old):
                if stop > self.instance.num_layers or self.instance.rate[node, stop - start] <= 0:
                    old[node] = 0, 0
            idle = [node for node, (start, stop) in enumerate(old) if start == stop]
            yield "the previous ranges", old.copy()
            yield (
                "the previous ranges, newcomers where it is worst",
                cover(self.instance, old, idle, self.top),
            )
        yield from seeds(self.instance, self.rules.max_hops, self.top)

    def _total_s(self, ranges: Ranges, tables: Tables) -> float:
        room = make_room(self.instance.num_nodes, self.instance.num_layers)
        start, stop = ranges[:, 0].copy(), ranges[:, 1].copy()
        return float(cost_of(start, stop, tables, room, 0.0, 1.0, FAR).total_s)

    def _ranges(self, arrangement: Arrangement) -> Ranges:
        held, _why = held_ranges(arrangement, self.instance)
        ranges = np.zeros((self.instance.num_nodes, 2), dtype=np.int64)
        for node, (start, stop) in {**held, **self.pins}.items():
            ranges[node] = start, stop
        return ranges

    def _arrangement(self, ranges: Ranges) -> Arrangement:
        """Rows are the distinct ranges, in order; idle nodes are in none."""
        rows: dict[tuple[int, int], list[int]] = {}
        for node, (start, stop) in enumerate(ranges.tolist()):
            if stop > start:
                rows.setdefault((start, stop), []).append(node)
        layers = tuple(sorted(rows))
        return Arrangement(tuple(tuple(rows[r]) for r in layers), layers)


@dataclass
class _Walk:
    """Where one annealing run starts and what it found."""

    start: Ranges
    best: Ranges
    best_s: float
    state: NDArray[np.uint64]
