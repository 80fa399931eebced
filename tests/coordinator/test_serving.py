"""Serving placements: the flow is exact, the search reaches the optimum, the bound holds."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import inf, isfinite

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmnode.coordinator.cost.serving import (
    ServingInstance,
    ServingRules,
    price_serving,
    serving_flow,
)
from swarmnode.coordinator.objective import NOBODY, Arrangement, Effort, Previous
from swarmnode.coordinator.solver.serving.bound import throughput_bound
from swarmnode.coordinator.solver.serving.front import front
from swarmnode.coordinator.solver.serving.kernels import FAR, cost_of, make_room
from swarmnode.coordinator.solver.serving.objective import ServingObjective
from swarmnode.coordinator.solver.serving.search import make_tables
from swarmnode.errors import CapacityError
from tests.coordinator.serving_cases import (
    QUICK,
    alike_instance,
    helix_instance,
    random_instance,
)

seeds = st.integers(0, 2**32 - 1)


def random_ranges(instance: ServingInstance, seed: int) -> dict[int, tuple[int, int]]:
    """Some placement, biased towards ranges that meet."""
    random = np.random.default_rng(seed)
    ends = [0, *sorted(random.integers(1, instance.num_layers, 2).tolist()), instance.num_layers]
    held = {}
    for node in range(instance.num_nodes):
        most = int(np.flatnonzero(instance.rate[node]).max())
        start = int(random.choice(ends[:-1]))
        stop = int(random.choice([*ends[1:], min(start + most, instance.num_layers)]))
        if 0 < stop - start <= most:
            held[node] = (start, stop)
    return held


def arranged(held: dict[int, tuple[int, int]]) -> Arrangement:
    layers = tuple(sorted(set(held.values())))
    rows = [tuple(node for node in sorted(held) if held[node] == r) for r in layers]
    return Arrangement(tuple(rows), layers)


def all_arrangements(instance: ServingInstance) -> Iterator[Arrangement]:
    options = []
    for rates in instance.rate:
        most = int(np.flatnonzero(rates).max())
        ranges = [
            (a, a + k) for k in range(1, most + 1) for a in range(instance.num_layers - k + 1)
        ]
        options.append([None, *ranges])
    for choice in product(*options):
        yield arranged({node: r for node, r in enumerate(choice) if r is not None})


def kernel_cost(
    instance: ServingInstance, held: dict[int, tuple[int, int]], rules: ServingRules
) -> tuple[float, float, int, float]:
    tables = make_tables(instance, rules, None, 1e6)
    start, stop = (np.zeros(instance.num_nodes, dtype=np.int64) for _ in range(2))
    for node, (a, b) in held.items():
        start[node], stop[node] = a, b
    room = make_room(instance.num_nodes, instance.num_layers)
    cost = cost_of(start, stop, tables, room, 0.0, 1.0, FAR)
    return cost.total_s, cost.flow, cost.hops, cost.latency_s


def oracle_flow(
    instance: ServingInstance, held: dict[int, tuple[int, int]], *, partial: bool
) -> float:
    """networkx on the graph as the definition says."""
    networkx = pytest.importorskip("networkx")
    graph = networkx.DiGraph()
    graph.add_nodes_from(["source", "sink"])
    for j, (start, stop) in held.items():
        graph.add_edge((j, "in"), (j, "out"), capacity=instance.rate[j, stop - start])
        if start == 0:
            graph.add_edge("source", (j, "in"), capacity=instance.source_tokens_per_s[j])
        if stop == instance.num_layers:
            graph.add_edge((j, "out"), "sink", capacity=instance.sink_tokens_per_s[j])
        for i, (_a, end) in held.items():
            if end == start or (partial and start <= end < stop):
                graph.add_edge((i, "out"), (j, "in"), capacity=instance.link_tokens_per_s[i, j])
    return float(networkx.maximum_flow_value(graph, "source", "sink"))


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(2, 9), st.booleans(), st.booleans())
def test_the_flow_is_that_of_an_independent_solver(
    seed: int, num_nodes: int, partial: bool, sparse: bool
) -> None:
    instance = random_instance(seed, num_nodes, 6, sparse=sparse)
    held = random_ranges(instance, seed)
    flow = serving_flow(instance, arranged(held), ServingRules(partial=partial))
    assert flow is not None
    assert flow.tokens_per_s == pytest.approx(oracle_flow(instance, held, partial=partial))
    assert sum(chain.tokens_per_s for chain in flow.chains) == pytest.approx(flow.tokens_per_s)
    assert all(len(chain.nodes) <= flow.hops for chain in flow.chains)


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(2, 9), st.booleans())
def test_the_compiled_kernel_agrees_with_the_exact_price(
    seed: int, num_nodes: int, partial: bool
) -> None:
    instance = random_instance(seed, num_nodes, 6, sparse=seed % 2 == 0)
    held = random_ranges(instance, seed)
    rules = ServingRules(partial=partial, max_hops=3, latency_weight=0.1)
    price = price_serving(instance, arranged(held), rules)
    total_s, flow, hops, latency_s = kernel_cost(instance, held, rules)
    assert (total_s < FAR) == isfinite(price.total_s)
    if isfinite(price.total_s):
        assert total_s == pytest.approx(price.total_s)
        assert flow == pytest.approx(price.parts["tokens_per_s"])
        assert hops == price.parts["hops"]
        assert latency_s == pytest.approx(price.parts["latency_s"])


def test_a_binding_link_source_or_sink_lowers_the_flow() -> None:
    instance = random_instance(1, 2, 2)
    link = np.array([[0.0, 5.0], [5.0, 0.0]])
    wide = np.full(2, 1e3)
    rate = np.array([[0.0, 9.0, 3.0], [0.0, 8.0, 2.0]])
    free = replace(
        instance,
        rate=rate,
        link_tokens_per_s=link * 10,
        source_tokens_per_s=wide,
        sink_tokens_per_s=wide,
    )
    chain = arranged({0: (0, 1), 1: (1, 2)})

    def tokens_per_s(case: ServingInstance) -> float:
        return price_serving(case, chain, ServingRules()).parts["tokens_per_s"]

    assert tokens_per_s(free) == pytest.approx(8.0)
    assert tokens_per_s(replace(free, link_tokens_per_s=link)) == pytest.approx(5.0)
    assert tokens_per_s(replace(free, source_tokens_per_s=wide / 250)) == pytest.approx(4.0)
    assert tokens_per_s(replace(free, sink_tokens_per_s=wide / 500)) == pytest.approx(2.0)


def test_a_token_enters_the_middle_of_a_range_only_with_partial_ranges() -> None:
    overlapping = arranged({0: (0, 3), 1: (2, 5), 2: (5, 6)})
    instance = alike_instance(3, (10.0, 4.0, 2.0))
    partly = price_serving(instance, overlapping, ServingRules(partial=True))
    assert partly.parts["tokens_per_s"] == pytest.approx(2.0)
    assert price_serving(instance, overlapping, ServingRules(partial=False)).total_s == inf


@settings(max_examples=25, deadline=None)
@given(seeds, st.booleans(), st.sampled_from([None, 1, 2]))
def test_the_search_finds_the_best_of_all_arrangements(
    seed: int, partial: bool, max_hops: int | None
) -> None:
    instance = random_instance(seed, 3, 3, sparse=seed % 3 == 0)
    objective = ServingObjective(instance, partial=partial, max_hops=max_hops)
    best_s = min(objective.price(a).total_s for a in all_arrangements(instance))
    if best_s == inf:
        with pytest.raises(CapacityError):
            objective.first(None)
        return
    found = objective.search(objective.first(None), None, QUICK)
    bound = objective.bound(QUICK)
    assert found.is_optimal
    assert objective.price(found.arrangement).total_s == pytest.approx(best_s)
    assert bound is not None
    assert bound.seconds <= best_s * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_annealing_alone_finds_the_optimum_too(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    instance = random_instance(seed, 4, 4)
    objective = ServingObjective(instance)
    start = objective.first(None)
    best = objective.search(start, None, QUICK)
    monkeypatch.setattr("swarmnode.coordinator.solver.serving.search.MOST_COMBINATIONS", 0)
    walked = objective.search(start, None, Effort(moves=600_000))
    assert best.is_optimal
    assert walked.moves_done > 0
    assert "annealing" in walked.reasons[0]
    cost_s = objective.price(walked.arrangement).total_s
    assert cost_s == pytest.approx(objective.price(best.arrangement).total_s)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(2, 9), st.sampled_from([None, 2, 4]), st.booleans())
def test_no_arrangement_beats_the_bound(
    seed: int, num_nodes: int, max_hops: int | None, timed: bool
) -> None:
    instance = random_instance(seed, num_nodes, 6)
    rules = ServingRules(max_hops=max_hops, max_latency_s=0.15 if timed else None)
    price = price_serving(instance, arranged(random_ranges(instance, seed)), rules)
    if isfinite(price.total_s):
        top, _why = throughput_bound(instance, rules)
        assert price.parts["tokens_per_s"] <= top * (1 + 1e-9)


def test_the_bound_is_reached_by_a_chain_without_slack_and_not_below() -> None:
    objective = ServingObjective(alike_instance(3, (10.0, 4.0, 1.0)))
    found = objective.search(objective.first(None), None, QUICK)
    assert found.is_optimal
    assert objective.top == pytest.approx(4.0)
    assert objective.price(found.arrangement).parts["tokens_per_s"] == pytest.approx(4.0)
    assert throughput_bound(alike_instance(2, (10.0, 4.0, 1.0)), ServingRules())[0] < 4.0


def test_limits_hold_for_every_usable_chain_even_one_without_flow() -> None:
    instance = alike_instance(3, (10.0, 4.0, 4.0), 3)
    held = {0: (0, 3), 1: (0, 1), 2: (1, 3)}
    assert price_serving(instance, arranged(held), ServingRules()).parts["hops"] == 2
    assert price_serving(instance, arranged(held), ServingRules(max_hops=1)).total_s == inf
    assert isfinite(
        price_serving(instance, arranged({0: (0, 3)}), ServingRules(max_hops=1)).total_s
    )
    late = ServingRules(max_latency_s=0.0005)
    assert price_serving(instance, arranged(held), late).total_s == inf


def test_the_same_effort_finds_the_same_and_stops_when_told() -> None:
    objective = ServingObjective(random_instance(3, 12, 12), max_hops=5)
    start = objective.first(None)
    effort = Effort(moves=30_000, seed=7)
    first, again = (objective.search(start, None, effort) for _ in range(2))
    assert first == again
    told: list[tuple[float, float]] = []
    stopped = objective.search(
        start,
        None,
        Effort(
            moves=10**9,
            should_stop=lambda: len(told) >= 2,
            report=lambda done, best: told.append((done, best)),
        ),
    )
    assert stopped.moves_done < 10**6
    assert objective.price(stopped.arrangement).total_s <= objective.price(start).total_s
    assert objective.price(first.arrangement).parts["hops"] <= 5


def test_the_front_never_falls_and_obeys_each_limit() -> None:
    instance = random_instance(11, 8, 8)
    points = front(instance, Effort(moves=20_000))
    rates = [point.tokens_per_s for point in points]
    assert rates == sorted(rates)
    assert rates[-1] > rates[0]
    assert all(point.hops <= point.max_hops for point in points)
    assert all(p.tokens_per_s <= p.bound_tokens_per_s * (1 + 1e-9) for p in points)
    assert points[-1].max_hops == 8


def test_charges_keep_the_previous_ranges_until_moving_pays() -> None:
    instance = alike_instance(3, (10.0, 4.0, 2.0))
    old = Arrangement(((0, 1), (2,)), ((0, 3), (3, 6)))

    def after(charge_s: float) -> tuple[ServingObjective, Arrangement, float]:
        objective = ServingObjective(instance)
        previous = Previous(old, np.array([[0.0, charge_s], [0.0, charge_s], [charge_s, 0.0]]))
        start = objective.first(previous)
        found = objective.search(start, previous, QUICK).arrangement
        return objective, found, objective.charged_s(found, previous)

    objective, stayed, charged_s = after(100.0)
    assert charged_s == 0.0
    _objective, moved, charged_s = after(1e-6)
    assert charged_s == pytest.approx(1e-6 / 3)  # one layer of three is new to one node
    assert objective.price(moved).total_s < objective.price(stayed).total_s


def test_after_a_loss_the_first_answer_is_valid_and_close() -> None:
    objective = ServingObjective(alike_instance(6, (10.0, 4.0, 2.0)))
    old = Arrangement(((0, NOBODY), (2, 3)), ((0, 3), (3, 6)))
    previous = Previous(old, np.array([[0, 9], [0, 0], [9, 0], [9, 0], [0, 0], [0, 0]]) * 1.0)
    first = objective.first(previous)
    assert isfinite(objective.price(first).total_s)
    assert objective.charged_s(first, previous) == 0.0


@pytest.mark.parametrize("partial", [False, True])
def test_helix_single24_is_solved_to_a_proven_optimum(partial: bool) -> None:
    objective = ServingObjective(helix_instance(), partial=partial)
    found = objective.search(objective.first(None), None, QUICK)
    assert found.is_optimal
    assert objective.price(found.arrangement).parts["tokens_per_s"] == pytest.approx(2045.6410)
    assert objective.top == pytest.approx(2045.6410)


def test_twelve_hops_beat_the_published_placement_of_helix_single24() -> None:
    objective = ServingObjective(helix_instance(), max_hops=12)
    parts = objective.price(objective.first(None)).parts
    assert parts["tokens_per_s"] > 1289.56
    assert parts["hops"] <= 12
    assert parts["tokens_per_s"] <= objective.top
