"""What a move costs, how long it may pay, and when it is worth it."""

import numpy as np
import pytest

from swarmnode.coordinator.objective import NOBODY, Arrangement
from swarmnode.coordinator.topology import Topology, make_topology
from swarmnode.coordinator.transition import (
    LONGEST_CALM_S,
    PRIOR_CALM_S,
    Churn,
    Move,
    charges,
    move_seconds,
)

LAYERS = ((0, 1), (1, 2))
STATE_BYTES = (1e6, 4e6)


def lan(num_nodes: int, bytes_per_s: float = 1e6) -> Topology:
    shape = (num_nodes, num_nodes)
    names = [f"n{i}" for i in range(num_nodes)]
    return make_topology(names, np.zeros(shape), np.full(shape, bytes_per_s))


def test_a_node_pays_for_stages_that_it_does_not_hold_and_a_newcomer_for_none() -> None:
    before = Arrangement(((0, 1), (2, NOBODY)), LAYERS)
    found = charges(before, lan(4), STATE_BYTES, num_steps=10.0)
    assert found.charge_s.tolist() == [[0, 0.4], [0, 0.4], [0.1, 0], [0, 0]]


def test_the_state_comes_over_the_fastest_link_of_its_holders() -> None:
    topology = lan(3)
    topology.bytes_per_s[1, 2] = 8e6  # node 1 holds stage 0 as well, and is near node 2
    before = Arrangement(((0, 1), (2, 2)), LAYERS)
    assert charges(before, topology, STATE_BYTES, 1.0).charge_s[2, 0] == pytest.approx(1 / 8)


def test_where_nobody_holds_a_stage_or_reaches_a_node_the_charge_is_finite() -> None:
    topology = lan(3)
    topology.bytes_per_s[0, 1] = 0.0
    before = Arrangement(((0, 0), (NOBODY, NOBODY)), LAYERS)
    assert np.isfinite(charges(before, topology, STATE_BYTES, 1.0).charge_s).all()
    assert np.isfinite(
        move_seconds(before, Arrangement(((1, 0), (1, 2)), LAYERS), topology, STATE_BYTES)
    )


def test_nodes_fetch_side_by_side_and_what_is_held_is_free() -> None:
    before = Arrangement(((0, 1), (2, 3)), LAYERS)
    assert move_seconds(before, before, lan(4), STATE_BYTES) == 0.0
    repaired = Arrangement(((1, 0), (3, 2)), LAYERS)  # other pairs, the same stages
    assert move_seconds(before, repaired, lan(4), STATE_BYTES) == 0.0
    swapped = Arrangement(((2, 1), (0, 3)), LAYERS)
    assert move_seconds(before, swapped, lan(4), STATE_BYTES) == pytest.approx(4.0)


def test_a_move_must_save_clearly_more_time_than_it_takes() -> None:
    move = Move(step_s=10.0, new_step_s=5.0, move_s=60.0)
    assert move.refusal(calm_s=3600.0) is None
    assert "but the move takes 62 s" in str(move.refusal(calm_s=200.0))
    assert "too little" in str(Move(10.0, 9.5, 0.0).refusal(3600.0))
    assert "too little" in str(Move(10.0, 11.0, 0.0).refusal(3600.0))


def test_a_swarm_that_changes_often_is_calm_for_short() -> None:
    quiet, busy = Churn(0.0), Churn(0.0)
    for _ in range(9):
        busy.changed()
    assert quiet.calm_s(0.0) == PRIOR_CALM_S
    assert busy.calm_s(200.0) == pytest.approx((PRIOR_CALM_S + 200.0) / 10)
    assert quiet.calm_s(1e9) == LONGEST_CALM_S
