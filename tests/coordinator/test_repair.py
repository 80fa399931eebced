import time

import numpy as np
import pytest

from benchmarks.networks import irregular_swarm
from swarmnode.coordinator.objective import NOBODY, Arrangement, Effort, Previous
from swarmnode.coordinator.solver.grid.dtfm import DtfmObjective
from swarmnode.coordinator.solver.search import moved_nodes, solve
from swarmnode.errors import DataError

CHARGE_S = 0.5
"""Per surviving node that changes its stage: against a cost of some 65 s."""
MOST_MOVED = 5
MOST_ABOVE = 1.1
"""A repaired grid costs at most so many times what starting over costs."""


def with_four_replaced(seed: int) -> tuple[DtfmObjective, Arrangement]:
    """64 nodes, solved; then four leave and four come: the new objective, the old placement."""
    world = irregular_swarm(68, seed)
    before = DtfmObjective(world.take(range(64)), 8, 8)
    old = before.search(before.first(None), None, Effort(moves=3_000_000)).arrangement
    gone = set(np.random.default_rng(seed).choice(64, 4, replace=False).tolist())
    stay = [node for node in range(68) if node not in gone]
    number = {node: i for i, node in enumerate(stay)}
    slots = tuple(tuple(number.get(node, NOBODY) for node in row) for row in old.slots)
    after = DtfmObjective(world.take(stay), 8, 8, most_moved=MOST_MOVED)
    return after, Arrangement(slots, old.layers)


def charging(old: Arrangement, num_nodes: int, charge_s: float) -> Previous:
    charges = np.zeros((num_nodes, len(old.slots)))
    for stage, row in enumerate(old.slots):
        for node in row:
            if node != NOBODY:
                charges[node] = charge_s
                charges[node, stage] = 0.0
    return Previous(old, charges)


@pytest.fixture(scope="module")
def replaced() -> tuple[DtfmObjective, Arrangement]:
    return with_four_replaced(seed=3)


def test_seats_are_taken_within_100_ms_and_nobody_else_moves(
    replaced: tuple[DtfmObjective, Arrangement],
) -> None:
    objective, old = replaced
    previous = charging(old, 64, CHARGE_S)
    began_s = time.process_time()
    first = objective.first(previous)
    assert time.process_time() - began_s < 0.1
    assert moved_nodes(first, previous) == ()
    assert sorted(first.nodes) == list(range(64))
    assert objective.charged_s(first, previous) == 0.0


def test_the_newcomers_and_the_lanes_are_chosen_well(
    replaced: tuple[DtfmObjective, Arrangement],
) -> None:
    objective, old = replaced
    first = objective.first(charging(old, 64, CHARGE_S))
    newcomers = iter(sorted(set(range(64)) - {n for row in old.slots for n in row}))
    naive = tuple(
        tuple(next(newcomers) if node == NOBODY else node for node in row) for row in old.slots
    )
    naive_s = objective.price(Arrangement(naive, old.layers)).total_s
    assert objective.price(first).total_s < naive_s


@pytest.mark.parametrize("seed", [9, 22])
def test_a_repair_moves_few_and_is_nearly_as_good_as_starting_over(seed: int) -> None:
    objective, old = with_four_replaced(seed)
    previous = charging(old, 64, CHARGE_S)
    repaired = solve(objective, previous=previous, effort=Effort(moves=8_000_000))
    cold = solve(objective, effort=Effort(moves=4_000_000))
    assert len(repaired.moved) <= MOST_MOVED
    assert repaired.cost_s <= MOST_ABOVE * cold.cost_s
    # Neither half is easy: taking the seats costs too much, starting over moves nearly all.
    assert objective.price(objective.first(previous)).total_s > MOST_ABOVE * cold.cost_s
    assert len(moved_nodes(cold.arrangement, previous)) > 20


def test_a_repair_is_the_same_for_a_seed_and_ends_when_told(
    replaced: tuple[DtfmObjective, Arrangement],
) -> None:
    objective, old = replaced
    previous = charging(old, 64, CHARGE_S)
    first = objective.first(previous)
    once, again = (
        objective.search(first, previous, Effort(moves=400_000, seed=5)).arrangement
        for _ in range(2)
    )
    assert once == again
    stopped = objective.search(first, previous, Effort(moves=50_000_000, should_stop=lambda: True))
    assert stopped.moves_done < 1_000_000


def test_without_a_limit_low_charges_move_more_than_the_limit_allows(
    replaced: tuple[DtfmObjective, Arrangement],
) -> None:
    objective, old = replaced
    previous = charging(old, 64, 0.01)
    free = DtfmObjective(objective.topology, 8, 8)
    effort = Effort(moves=800_000)
    assert len(solve(objective, previous=previous, effort=effort).moved) <= MOST_MOVED
    assert len(solve(free, previous=previous, effort=effort).moved) > MOST_MOVED


def test_a_pinned_node_stays_while_others_are_moved_around_it(
    replaced: tuple[DtfmObjective, Arrangement],
) -> None:
    objective, old = replaced
    moved = solve(objective, previous=charging(old, 64, 0.1), effort=Effort(moves=800_000)).moved
    pins = {node: s for s, row in enumerate(old.slots) for node in row if node in moved}
    pinned = DtfmObjective(objective.topology, 8, 8, pins=pins)
    kept = solve(pinned, previous=charging(old, 64, 0.1), effort=Effort(moves=400_000))
    assert moved
    assert not set(moved) & set(kept.moved)


def test_charges_that_nothing_is_worth_keep_everybody(
    replaced: tuple[DtfmObjective, Arrangement],
) -> None:
    objective, old = replaced
    previous = charging(old, 64, 1000.0)
    kept = solve(objective, previous=previous, effort=Effort(moves=300_000))
    assert kept.moved == ()
    assert kept.cost_s <= objective.price(objective.first(previous)).total_s


def test_a_spare_node_takes_the_seat_when_nobody_comes() -> None:
    objective = DtfmObjective(irregular_swarm(22, 2), 4, 5)
    rows = np.arange(20).reshape(4, 5)
    rows[2, 3] = NOBODY
    old = Arrangement(tuple(tuple(r) for r in rows.tolist()), tuple((s, s + 1) for s in range(4)))
    first = objective.first(charging(old, 22, 1.0))
    assert moved_nodes(first, charging(old, 22, 1.0)) == ()
    assert set(first.nodes) >= set(range(20)) - {13}
    assert len(first.nodes) == 20


def test_a_placement_of_another_shape_is_only_a_reason_to_begin_anew() -> None:
    objective = DtfmObjective(irregular_swarm(20, 2), 4, 5)
    other = Arrangement(((0, 1), (2, 3)), ((0, 1), (1, 2)))
    fresh = objective.first(None)
    assert objective.first(Previous(other, np.zeros((20, 2)))) == fresh
    halves = Arrangement(fresh.slots, tuple((2 * s, 2 * s + 2) for s in range(4)))
    assert objective.first(Previous(halves, np.zeros((20, 4)))) == fresh
    found = objective.search(fresh, Previous(other, np.zeros((20, 2))), Effort(moves=20_000))
    assert len(found.arrangement.nodes) == 20


def test_a_node_on_two_seats_keeps_one_and_pins_win() -> None:
    objective = DtfmObjective(irregular_swarm(24, 2), 4, 5, pins={23: 1, 0: 2})
    rows = np.arange(20).reshape(4, 5)
    rows[3] = rows[0]
    old = Arrangement(tuple(tuple(r) for r in rows.tolist()), tuple((s, s + 1) for s in range(4)))
    first = objective.first(Previous(old, np.zeros((24, 4))))
    assert len(first.nodes) == 20
    assert 23 in first.slots[1]
    assert 0 in first.slots[2]


def test_charges_of_a_wrong_shape_are_refused() -> None:
    objective = DtfmObjective(irregular_swarm(20, 2), 4, 5)
    first = objective.first(None)
    with pytest.raises(DataError, match="charges"):
        objective.first(Previous(first, np.zeros((20, 3))))
