"""The objective `serving`: tokens per second through ranges of layers, latency within limits."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import inf

import numpy as np

from swarmnode.coordinator.cost.serving import (
    ServingInstance,
    ServingRules,
    held_ranges,
    price_serving,
)
from swarmnode.coordinator.objective import Arrangement, Bound, Effort, Found, Previous, Price
from swarmnode.coordinator.solver.serving.bound import (
    fewest_hops,
    least_latency_s,
    throughput_bound,
)
from swarmnode.coordinator.solver.serving.grid_search import GridSearch
from swarmnode.coordinator.solver.serving.search import RangeSearch, charge_by_node
from swarmnode.coordinator.solver.serving.words import explain_serving
from swarmnode.errors import CapacityError, DataError

Range = tuple[int, int]


class ServingObjective:
    """Serving on one instance: an Objective.

    With `grid=(S, V)` columns of the arrangement are the only chains and `ends`, S + 1 layers,
    fixes where stages begin and end; without `ends` the boundaries are free. `pins` maps a node
    to its stage in a grid, otherwise to its range of layers.

    Charges: `previous.charge_s` is by node and stage of the previous arrangement. A node that
    keeps its layers pays nothing. Layers that it did not hold cost it, each, the largest of
    charge / layers over the previous stages: what is charged depends on how much it must fetch.
    """

    name = "serving"

    def __init__(
        self,
        instance: ServingInstance,
        *,
        max_hops: int | None = None,
        max_latency_s: float | None = None,
        latency_weight: float = 0.0,
        partial: bool = True,
        grid: tuple[int, int] | None = None,
        ends: Sequence[int] | None = None,
        pins: Mapping[int, int | Range] | None = None,
    ) -> None:
        """Raises: DataError if a limit or a pin makes no sense."""
        self.instance = instance
        self.topology = instance.topology
        self.rules = ServingRules(max_hops, max_latency_s, latency_weight, partial, grid)
        self.pins = dict(pins or {})
        self.ends = None if ends is None else tuple(ends)
        _check_rules(self.rules, self.ends, instance)
        _check_pins(self.pins, self.rules, instance)
        self.top, self._why = throughput_bound(instance, self.rules)

    def price(self, arrangement: Arrangement) -> Price:
        """Seconds per token, plus what latency weighs; inf if impossible or beyond a limit."""
        if not self._is_as_told(arrangement):
            return Price(inf, {"tokens_per_s": 0.0, "hops": 0.0, "num_chains": 0.0})
        return price_serving(self.instance, arrangement, self.rules)

    def charged_s(self, arrangement: Arrangement, previous: Previous | None) -> float:
        """What leaving `previous` adds to the price of `arrangement`, in seconds per token.

        Rows of `arrangement` are no stages of `previous`: the charge goes by layers and nodes.
        """
        held, _why = held_ranges(arrangement, self.instance)
        old, each_s = charge_by_node(self.instance, previous)
        total_s = 0.0
        for node, (start, stop) in sorted(held.items()):
            kept = min(stop, int(old[node, 1])) - max(start, int(old[node, 0]))
            total_s += float(each_s[node]) * (stop - start - max(0, kept))
        return total_s

    def first(self, previous: Previous | None) -> Arrangement:
        """The cheapest of the seeds, and of `previous` as it is and with newcomers filled in.

        Raises: CapacityError with one line that says what is missing.
        """
        found = self._search(previous).first() if self.top > 0 else None
        if found is None:
            raise CapacityError(self._what_is_missing())
        return found

    def search(self, start: Arrangement, previous: Previous | None, effort: Effort) -> Found:
        """All combinations where they are few, else annealing in several runs."""
        found = self._search(previous).run(start, effort)
        if self._total_s(found.arrangement, previous) <= self._total_s(start, previous):
            return found
        return Found(start, found.moves_done, False, found.reasons)

    def bound(self, effort: Effort) -> Bound | None:  # noqa: ARG002 - closed form, no effort
        """Seconds per token below which nothing gets: see serving_bound."""
        if self.top <= 0:
            return None
        latency_s = least_latency_s(self.instance) if self.rules.latency_weight else 0.0
        seconds = 1.0 / self.top + self.rules.latency_weight * latency_s
        return Bound(seconds, f"at most {self.top:.2f} tokens/s: {self._why}")

    def explain(self, arrangement: Arrangement) -> tuple[str, ...]:
        """What each kind holds and why, the bottleneck, and what more nodes or links would bring.

        One more node is re-solved from the seeds with a short search; links are re-priced only.
        """
        return explain_serving(self.instance, self.rules, arrangement, self.top, self._resolve)

    def _search(self, previous: Previous | None) -> RangeSearch | GridSearch:
        if self.rules.grid is None:
            ranges = {n: pin for n, pin in self.pins.items() if isinstance(pin, tuple)}
            return RangeSearch(self.instance, self.rules, ranges, previous, self.top)
        stages = {n: pin for n, pin in self.pins.items() if isinstance(pin, int)}
        return GridSearch(self.instance, self.rules, self.ends, stages, previous, self.top)

    def _resolve(self, instance: ServingInstance, moves: int) -> float:
        """Tokens/s that a short search finds on a changed swarm under the same rules."""
        other = ServingObjective(
            instance,
            max_hops=self.rules.max_hops,
            max_latency_s=self.rules.max_latency_s,
            latency_weight=self.rules.latency_weight,
            partial=self.rules.partial,
            grid=self.rules.grid,
            ends=self.ends,
            pins=self.pins,
        )
        try:
            found = other.search(other.first(None), None, Effort(moves=moves))
        except CapacityError:
            return 0.0
        return float(other.price(found.arrangement).parts["tokens_per_s"])

    def _total_s(self, arrangement: Arrangement, previous: Previous | None) -> float:
        return self.price(arrangement).total_s + self.charged_s(arrangement, previous)

    def _is_as_told(self, arrangement: Arrangement) -> bool:
        """Whether pins and fixed boundaries are obeyed."""
        ends = [0, *(stop for _start, stop in arrangement.layers)]
        if self.rules.grid is not None and self.ends is not None and tuple(ends) != self.ends:
            return False
        rows = zip(arrangement.layers, arrangement.slots, strict=False)
        at = {node: (s, layers) for s, (layers, row) in enumerate(rows) for node in row}
        by = 0 if self.rules.grid is not None else 1
        return all(node in at and at[node][by] == pin for node, pin in self.pins.items())

    def _what_is_missing(self) -> str:
        """One line: the first reason that can be told apart."""
        instance, rules = self.instance, self.rules
        least = fewest_hops(instance)
        if rules.grid and rules.grid[0] * rules.grid[1] > instance.num_nodes:
            stages, slots = rules.grid
            return f"{instance.num_nodes} nodes for {stages} stages x {slots} slots; add nodes"
        if least > instance.num_nodes:
            held = sum(int(np.flatnonzero(row).max(initial=0)) for row in instance.rate)
            return f"all nodes hold {held} of {instance.num_layers} layers; add nodes or memory"
        hops = rules.grid[0] if rules.grid else rules.max_hops
        if hops is not None and least > hops:
            return f"no chain of {hops} nodes holds the model, {least} are needed; allow more"
        if rules.max_latency_s is not None and least_latency_s(instance) > rules.max_latency_s:
            return "no chain is within the latency limit; raise it or use nearer, faster nodes"
        return "no chain through the whole model was found within the limits, links and pins"


def _check_rules(
    rules: ServingRules, ends: tuple[int, ...] | None, instance: ServingInstance
) -> None:
    if rules.max_hops is not None and rules.max_hops < 1:
        raise DataError(f"max_hops is {rules.max_hops}; give at least 1")
    if rules.max_latency_s is not None and not 0 <= rules.max_latency_s < inf:
        raise DataError(f"max_latency_s is {rules.max_latency_s}; give seconds, at least 0")
    if not 0 <= rules.latency_weight < inf:
        raise DataError(f"latency_weight is {rules.latency_weight}; give a number, at least 0")
    if rules.grid is not None:
        stages, slots = rules.grid
        if stages < 1 or slots < 1 or stages > instance.num_layers:
            raise DataError(
                f"{stages} stages x {slots} slots for {instance.num_layers} layers; ask for a "
                "stage a layer at most"
            )
    if ends is not None:
        is_rising = all(a < b for a, b in pairwise(ends))
        fits = rules.grid is not None and len(ends) == rules.grid[0] + 1
        if not (fits and is_rising and ends[0] == 0 and ends[-1] == instance.num_layers):
            raise DataError(f"the stages' ends {ends} do not split the model; check the grid")


def _check_pins(
    pins: Mapping[int, int | Range], rules: ServingRules, instance: ServingInstance
) -> None:
    for node, pin in sorted(pins.items()):
        if not 0 <= node < instance.num_nodes:
            raise DataError(f"a pin names node {node} of {instance.num_nodes}")
        if rules.grid is not None:
            if not isinstance(pin, int) or not 0 <= pin < rules.grid[0]:
                raise DataError(f"node {node} is pinned to stage {pin} of {rules.grid[0]}")
        elif isinstance(pin, int) or not 0 <= pin[0] < pin[1] <= instance.num_layers:
            raise DataError(
                f"node {node} is pinned to {pin}; give a range of layers, 0:1 to "
                f"0:{instance.num_layers}"
            )
        elif instance.rate[node, pin[1] - pin[0]] <= 0:
            raise DataError(f"node {node} is pinned to {pin}, which its memory cannot hold")
