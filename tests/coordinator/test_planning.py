"""From files to problems: sizes, pins, earlier plans, grids left open."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmnode.coordinator.cost.dtfm import ACTIVATION_BYTES, GRADIENT_BYTES
from swarmnode.coordinator.objective import NOBODY, Arrangement, Effort
from swarmnode.coordinator.planning import Wanted, build
from swarmnode.coordinator.planning.dtfm import (
    dtfm_bytes,
    dtfm_shapes,
)
from swarmnode.coordinator.planning.inputs import (
    PRESETS,
    EarlierPlan,
    Machine,
    kv_share,
    llama_facts,
    read_gone,
    read_machines,
    read_pins,
    read_plan,
    read_range_pins,
    read_topology,
)
from swarmnode.coordinator.planning.training import job_of
from swarmnode.errors import CapacityError, DataError, UserError

TINY: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 56,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
QUICK = Effort(moves=2000)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
)


def network(count: int, **extra: Any) -> dict[str, Any]:
    random = np.random.default_rng(count)
    gbps = random.uniform(0.2, 2.0, (count, count))
    return {
        "latency_ms": np.full((count, count), 10.0).tolist(),
        "bandwidth_gbps": np.minimum(gbps, gbps.T).tolist(),
        **extra,
    }


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"model_type": "qwen2"},
        {"model_type": "qwen3", "head_dim": 16},
        {"model_type": "mistral", "head_dim": 16},
    ],
)
def test_sizes_from_a_config_are_those_of_the_built_model(change: dict[str, Any]) -> None:
    from swarmnode.worker.models.tool import facts_of

    config = {**TINY, **change}
    assert llama_facts(config) == facts_of(config, 1, None)


def test_other_families_are_not_guessed() -> None:
    assert llama_facts({**TINY, "model_type": "gpt2"}) is None
    with pytest.raises(DataError, match="hidden_size"):
        llama_facts({**TINY, "hidden_size": "many"})


def test_presets_have_the_sizes_that_their_names_say() -> None:
    for name, billions in (("llama-1b", 1.35), ("llama-7b", 6.74), ("llama-70b", 69.0)):
        facts = llama_facts(PRESETS[name])
        assert facts is not None
        total = facts.num_layers * facts.layer_weights + facts.first_weights + facts.last_weights
        assert total == pytest.approx(billions * 1e9, rel=0.01)
    assert kv_share(PRESETS["llama-70b"]) == 1 / 8
    assert kv_share({}) == 1.0


def test_the_constants_are_dt_fms() -> None:
    assert GRADIENT_BYTES == 0.65e9
    assert pytest.approx(0.4712e9, rel=1e-3) == ACTIVATION_BYTES
    assert dtfm_bytes(8, 8) == (GRADIENT_BYTES, ACTIVATION_BYTES)
    gradient, activation = dtfm_bytes(4, 16)
    assert (gradient * 4, activation * 16) == (0.65e9 * 8, ACTIVATION_BYTES * 8)


def test_open_grids_use_as_many_nodes_as_they_can() -> None:
    assert dtfm_shapes(64, None, None) == [(8, 8)]
    assert dtfm_shapes(36, None, None) == [(s, 36 // s) for s in (1, 2, 3, 4, 6, 9, 12, 18)]
    assert all(s * v <= 37 < s * (v + 1) for s, v in dtfm_shapes(37, None, None))
    assert dtfm_shapes(64, 4, None) == [(4, 16)]
    assert dtfm_shapes(64, None, 4) == [(16, 4)]


def test_machines_are_matched_by_name_and_filled_with_defaults() -> None:
    raw = [{"name": "b", "tflops": 10}, {"name": "a", "memory_gb": 8}, {"name": "elsewhere"}]
    a, b = read_machines({"nodes": raw}, ["a", "b"])
    assert (a.memory_bytes, a.flops) == (8e9, Machine().flops)
    assert b.flops == 10e12
    assert read_machines([{"flops": 1e12}], ["anything"])[0].flops == 1e12


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ([{"name": "a"}, {"name": "a"}], "twice"),
        ([{"name": "a"}, {"name": "c"}], "lacks 'b'"),
        ([{}], "has 1 nodes"),
        ([{"tflop": 1}, {}], "unknown key"),
        ([{"tflops": 0}, {}], "over 0"),
        ([{"tflops": float("nan")}, {}], "over 0"),
        ([{"memory_gb": "24"}, {}], "not a number"),
        ([{"memory_gb": True}, {}], "not a number"),
        ([{"flops": 10**400}, {}], "over 0"),
        ([{"memory_gb": 1e308}, {}], "give 1e-09 to 1e"),
        ([{"tflops": 1e-300}, {}], "give 1e-12 to 1e"),
        ("nodes", "no list"),
    ],
)
def test_a_wrong_nodes_file_is_named(raw: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_machines(raw, ["a", "b"])


def test_pins_name_nodes_or_indices() -> None:
    names = ["a=b", "c", "2"]
    assert read_pins(["a=b=1", "1=0"], names, 2) == {0: 1, 1: 0}
    assert read_range_pins(["c=0:8"], names) == {1: (0, 8)}
    for wrong in ("c", "c=x", "c=2", "d=0", "=0", "99999999999=0", "c=-1"):
        with pytest.raises(DataError, match="--pin"):
            read_pins([wrong], names, 2)
    with pytest.raises(DataError, match="pinned to stage 0"):
        read_pins(["c=0", "c=1"], names, 2)
    with pytest.raises(DataError, match="FROM:TO"):
        read_range_pins(["c=1"], names)


def test_pins_know_nodes_by_their_index_in_the_file() -> None:
    assert read_pins(["5=0", "a=1"], ["a", "c"], 2, (3, 5)) == {1: 0, 0: 1}
    assert read_range_pins(["3=0:2"], ["a", "c"], (3, 5)) == {0: (0, 2)}
    with pytest.raises(DataError, match="no node '0', or it is gone"):
        read_pins(["0=0"], ["a", "c"], 2, (3, 5))


@given(JUNK)
def test_no_json_breaks_the_readers(raw: Any) -> None:
    def survives(reader: Any) -> None:
        with suppress(UserError):
            reader()

    mapping = raw if isinstance(raw, dict) else {"assignment": raw, "layers": raw, "gone": raw}
    tables = {"latency_ms": raw, "bandwidth_gbps": raw, "names": raw, "regions": raw}
    survives(lambda: read_topology(tables))
    survives(lambda: read_topology({**network(2), "names": raw}))
    survives(lambda: read_topology({**network(2), "regions": raw}))
    survives(lambda: read_machines(raw, ["a"]))
    survives(lambda: read_plan(mapping))
    survives(lambda: read_gone(mapping))
    survives(lambda: llama_facts({**TINY, "hidden_size": raw, "head_dim": raw}))


@pytest.mark.parametrize("row", ["12", ["1", 2], [True, 2], {"0": 1, "1": 2}, 5, [[1], 2]])
def test_tables_hold_numbers_only(row: object) -> None:
    for key in ("latency_ms", "bandwidth_gbps"):
        raw = network(2)
        raw[key][1] = row
        with pytest.raises(DataError, match=f"{key} is not a square table of numbers"):
            read_topology(raw)


def test_an_earlier_plan_is_read_back() -> None:
    plan = read_plan({"objective": "dtfm", "assignment": [[0, 9]], "layers": [[0, 1]], "gone": [1]})
    assert plan == EarlierPlan("dtfm", Arrangement(((0, 9),), ((0, 1),)), frozenset([1]))
    for wrong in (
        {},
        {"assignment": [], "layers": []},
        {"assignment": [[0]], "layers": []},
        {"assignment": [["a"]], "layers": [[0, 1]]},
        {"assignment": [[0]], "layers": [[1, 1]]},
        {"assignment": [[0]], "layers": [[0, 1]], "gone": 3},
    ):
        with pytest.raises(DataError):
            read_plan(wrong)


def earlier(rows: tuple[tuple[int, ...], ...], objective: str = "dtfm") -> EarlierPlan:
    layers = tuple((s, s + 1) for s in range(len(rows)))
    return EarlierPlan(objective, Arrangement(rows, layers), frozenset())


def test_dead_nodes_are_out_and_survivors_pay_for_other_stages() -> None:
    plan = earlier(((0, 1), (2, NOBODY)))
    wanted = Wanted("dtfm", network(6), earlier=plan, gone=frozenset([1]), horizon_steps=10)
    problem = build(wanted, QUICK)
    assert problem.nodes == (0, 2, 3, 4, 5)
    assert problem.previous is not None
    assert problem.previous.arrangement.slots == ((0, NOBODY), (1, NOBODY))
    charge = problem.previous.charge_s
    assert charge[0, 0] == charge[1, 1] == 0.0
    assert charge[0, 1] > 0.0
    assert charge[1, 0] > 0.0
    assert not charge[2:].any()
    patient = build(
        Wanted("dtfm", network(6), earlier=plan, gone=frozenset([1]), horizon_steps=20), QUICK
    ).previous
    assert patient is not None
    assert patient.charge_s[0, 1] == pytest.approx(charge[0, 1] / 2)


PLAN = earlier(((0, 1), (2, 3)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stages": 4}, "2 stages x 2 slots, not 4 x 2"),
        ({"objective": "training"}, "for the objective 'dtfm'"),
        ({"gone": frozenset([9])}, "only 6 nodes"),
        ({"earlier": earlier(((0, 1), (2, 6)))}, "has a node 6"),
        ({"earlier": earlier(((0, 1), (2, 0)))}, "node 0 in two places"),
        (
            {
                "earlier": replace(
                    PLAN, arrangement=replace(PLAN.arrangement, layers=((1, 2), (0, 1)))
                )
            },
            "do not split",
        ),
        ({"gone": frozenset(range(6))}, "every node"),
        ({"gone": frozenset([0, 1, 2])}, "need 4 nodes"),
        ({"earlier": earlier(((0, 1), (2,)))}, "unequal"),
    ],
)
def test_a_repair_that_cannot_be_is_refused(change: dict[str, Any], said: str) -> None:
    wanted = {
        "objective": "dtfm",
        "network": network(6),
        "earlier": earlier(((0, 1), (2, 3))),
        "model": llama_facts(TINY),
        **change,
    }
    with pytest.raises((DataError, CapacityError), match=said):
        build(Wanted(**wanted), QUICK)


def test_batches_divide_into_the_slots() -> None:
    facts = llama_facts(TINY)
    wanted = Wanted("training", {}, model=facts)
    assert job_of(wanted, 6).batch.num_microbatches == 66
    assert job_of(wanted, None).batch.sequence_length == TINY["max_position_embeddings"]
    odd = Wanted("training", {}, model=facts, batch={"num_microbatches": 7})
    with pytest.raises(UserError, match="do not divide into 2"):
        job_of(odd, 2)
    with pytest.raises(DataError, match=r"impossible: rows: .* equal to 1$"):
        job_of(Wanted("training", {}, model=facts, batch={"rows": 0}), 2)


def test_no_more_grids_are_tried_when_time_is_over() -> None:
    over = Effort(moves=2000, should_stop=lambda: True)
    notes = build(Wanted("dtfm", network(12)), over).notes
    assert any("tried 1 of 6 grids" in note for note in notes)


def test_an_open_grid_is_chosen_and_said() -> None:
    problem = build(Wanted("dtfm", network(12)), QUICK)
    slots = problem.objective.first(None).slots
    assert len(slots) * len(slots[0]) == 12
    assert any("tried 6 grids" in note for note in problem.notes)
    spare = build(Wanted("dtfm", network(12), stages=3, slots=3), QUICK)
    assert any("3 of 12 nodes stay spare" in note for note in spare.notes)


@settings(deadline=None, max_examples=6)
@given(st.integers(2, 5), st.integers(0, 1000), st.sampled_from(["training", "serving"]))
def test_loads_name_only_places_that_exist(count: int, seed: int, objective: str) -> None:
    facts = llama_facts(PRESETS["llama-1b"])
    problem = build(Wanted(objective, network(count), model=facts), Effort(moves=50, seed=seed))
    arrangement = problem.objective.first(None)
    load = problem.loads(arrangement)
    places = {(s, v) for s, row in enumerate(arrangement.slots) for v in range(len(row))}
    assert {p for pair in load.wires for p in pair} | set(load.nodes) <= places
    assert all(np.isfinite(x) and x >= 0 for x in (*load.wires.values(), *load.nodes.values()))
    assert load.worst_nodes <= places
