"""Serving placements: what comes in is checked, pins and grids are obeyed, answers explained."""

from dataclasses import replace
from itertools import pairwise
from math import inf, isfinite
from typing import Any

import numpy as np
import pytest

from swarmnode.coordinator.cost.serving import (
    ServingDevice,
    ServingInstance,
    ServingModel,
    parse_serving,
    serving_instance,
)
from swarmnode.coordinator.objective import NOBODY, Arrangement
from swarmnode.coordinator.solver.serving.objective import ServingObjective
from swarmnode.coordinator.topology import make_topology
from swarmnode.errors import CapacityError, DataError, UserError
from tests.coordinator.serving_cases import QUICK, alike_instance, random_instance, raw_network


@pytest.mark.parametrize(
    "bad",
    [
        Arrangement(((0,), (0,)), ((0, 3), (3, 6))),
        Arrangement(((0,),), ((0, 6),)),
        Arrangement(((9,),), ((0, 3),)),
        Arrangement(((0,), (1,)), ((0, 3),)),
        Arrangement(((0,),), ((3, 3),)),
        Arrangement(((0,),), ((-1, 2),)),
        Arrangement((), ()),
        Arrangement(((NOBODY,), (1,)), ((0, 3), (3, 6))),
    ],
)
def test_an_impossible_arrangement_costs_infinity(bad: Arrangement) -> None:
    objective = ServingObjective(alike_instance())
    assert objective.price(bad).total_s == inf
    assert "it serves nothing" in objective.explain(bad)[0]


def test_pins_are_obeyed() -> None:
    objective = ServingObjective(alike_instance(), pins={2: (0, 3)})
    found = objective.search(objective.first(None), None, QUICK)
    assert 2 in found.arrangement.slots[found.arrangement.layers.index((0, 3))]
    free = ServingObjective(alike_instance())
    assert objective.price(free.first(None)).total_s == inf


def test_a_grid_has_columns_as_chains_and_whole_rows() -> None:
    instance = random_instance(5, 8, 6)
    rate = np.column_stack([np.zeros(8), 40.0 / np.arange(1, 7) ** 1.2 * np.ones((8, 1))])
    instance = replace(instance, rate=rate)
    objective = ServingObjective(instance, grid=(3, 2), pins={7: 1})
    start = objective.first(None)
    found = objective.search(start, None, QUICK)
    price = objective.price(found.arrangement)
    assert [len(row) for row in found.arrangement.slots] == [2, 2, 2]
    assert 7 in found.arrangement.slots[1]
    assert price.total_s <= objective.price(start).total_s
    columns = zip(*found.arrangement.slots, strict=True)
    assert price.parts["tokens_per_s"] == pytest.approx(
        sum(column_rate(instance, nodes, found.arrangement.layers) for nodes in columns)
    )
    fixed = ServingObjective(instance, grid=(3, 2), ends=(0, 1, 2, 6))
    assert fixed.search(fixed.first(None), None, QUICK).arrangement.layers[2] == (2, 6)
    with pytest.raises(CapacityError, match="add nodes"):
        ServingObjective(instance, grid=(3, 3)).first(None)


def column_rate(
    instance: ServingInstance, nodes: tuple[int, ...], layers: tuple[tuple[int, int], ...]
) -> float:
    rates = [instance.rate[n, b - a] for n, (a, b) in zip(nodes, layers, strict=True)]
    rates += [instance.link_tokens_per_s[i, j] for i, j in pairwise(nodes)]
    ends = (instance.source_tokens_per_s[nodes[0]], instance.sink_tokens_per_s[nodes[-1]])
    return float(min(*rates, *ends))


def test_it_says_what_is_missing() -> None:
    with pytest.raises(CapacityError, match="hold 3 of 6 layers"):
        ServingObjective(alike_instance(1)).first(None)
    with pytest.raises(CapacityError, match="2 are needed"):
        ServingObjective(alike_instance(), max_hops=1).first(None)
    with pytest.raises(CapacityError, match="latency"):
        ServingObjective(alike_instance(), max_latency_s=0.0).first(None)
    cut_off = replace(alike_instance(), link_tokens_per_s=np.zeros((6, 6)))
    with pytest.raises(CapacityError):
        ServingObjective(cut_off).first(None)


def test_it_explains_who_holds_what_and_what_would_help() -> None:
    objective = ServingObjective(alike_instance(3, (10.0, 4.0, 1.0)))
    text = "\n".join(objective.explain(objective.first(None)))
    for words in ("3 with 2 layers", "least cut", "one more small: +", "links twice as fast: +0.0"):
        assert words in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layers", 0),
        ("layers", True),
        ("layers", 10**9),
        ("node_types", []),
        ("node_types", [1]),
        ("node_types", "T4"),
        ("link_tokens_per_s", [[1.0]]),
        ("link_tokens_per_s", "fast"),
        ("link_latency_s", [[{}]]),
        ("source_tokens_per_s", [1.0]),
        ("sink_tokens_per_s", None),
        ("tokens_per_s_by_layers", {}),
        ("tokens_per_s_by_layers", {"small": [-1.0]}),
        ("tokens_per_s_by_layers", {"small": ["x"]}),
        ("tokens_per_s_by_layers", {"small": [float("nan")]}),
        ("tokens_per_s_by_layers", []),
        ("layer_latency_s", {"small": -1}),
        ("names", ["a"]),
    ],
)
def test_odd_input_is_refused_in_one_line(key: str, value: object) -> None:
    with pytest.raises(DataError) as refused:
        parse_serving({**raw_network(), key: value})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", sorted(raw_network()))
def test_a_missing_key_is_named(key: str) -> None:
    raw = raw_network()
    del raw[key]
    with pytest.raises(DataError, match=key):
        parse_serving(raw)


def test_unknown_links_are_not_used() -> None:
    raw = raw_network(2, (10.0, 4.0, 2.0))
    raw["link_tokens_per_s"] = [[None, None], [float("inf"), 0]]
    raw["link_latency_s"] = [[0, 0.001], [None, 0]]
    assert not parse_serving(raw).link_tokens_per_s.any()


@pytest.mark.parametrize(
    "options",
    [
        {"max_hops": 0},
        {"max_latency_s": -1.0},
        {"latency_weight": float("nan")},
        {"grid": (0, 1)},
        {"grid": (7, 1)},
        {"ends": (0, 6)},
        {"grid": (2, 1), "ends": (0, 4, 3)},
        {"pins": {9: (0, 1)}},
        {"pins": {0: (0, 6)}},
        {"pins": {0: 1}},
        {"grid": (2, 1), "pins": {0: 2}},
    ],
)
def test_senseless_rules_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        ServingObjective(alike_instance(), **options)


def test_our_own_rates_follow_memory_and_roofline() -> None:
    topology = make_topology(["a", "b"], np.full((2, 2), 0.01), np.full((2, 2), 1e6))
    device = ServingDevice("gpu", memory_bytes=100.0, memory_bytes_per_s=1000.0, flops=1e6)
    model = ServingModel(8, 10.0, 1.0, 5.0, 1e3)
    instance = serving_instance(topology, [device, device], model, context_tokens=2)
    batch = (100 - 3 * 10) // (3 * 1 * 2)
    seconds = 3 * max(10 / 1000, batch * 5 / 1e6)
    assert instance.rate[0, 3] == pytest.approx(batch / seconds)
    assert instance.rate[0, 8] == pytest.approx(1 / (8 * 10 / 1000))
    assert instance.rate[0, 1] / instance.rate[0, 2] > 2
    tight = replace(device, memory_bytes=45.0)
    assert not serving_instance(topology, [tight] * 2, model, context_tokens=2).rate[:, 4:].any()
    assert instance.link_tokens_per_s[0, 1] == pytest.approx(1e3)
    assert instance.layer_s[0] == pytest.approx(0.01)
    objective = ServingObjective(instance)
    found = objective.search(objective.first(None), None, QUICK).arrangement
    assert isfinite(objective.price(found).total_s)
    with pytest.raises(DataError, match="above 0"):
        serving_instance(topology, [replace(device, flops=0.0)] * 2, model, context_tokens=2)
    with pytest.raises(DataError):
        serving_instance(topology, [device], model, context_tokens=2)
