from itertools import pairwise, permutations

import numpy as np
import pytest

from swarmnode.coordinator.solver.grid import multilevel, seeds
from swarmnode.coordinator.solver.grid.polish import (
    _improve_order,
    order_stages,
    pair_hops,
    pair_up,
    polish,
    stage_distances,
)


def distances(count: int, seed: int) -> np.ndarray:
    half = np.triu(np.random.default_rng(seed).uniform(1, 10, (count, count)), 1)
    return half + half.T


def path_s(order: tuple[int, ...], between: np.ndarray, seat: np.ndarray) -> float:
    hops = sum(between[a, b] for a, b in pairwise(order))
    return float(hops + sum(seat[s, place] for place, s in enumerate(order)))


@pytest.mark.parametrize("seed", range(20))
def test_the_dearest_pair_is_as_cheap_as_any_matching_allows(seed: int) -> None:
    cost = np.random.default_rng(seed).integers(0, 12, (5, 5)).astype(float)
    columns, worst = pair_up(cost)
    assert sorted(columns) == list(range(5))
    assert cost[range(5), columns].max() == worst
    assert worst == min(max(cost[range(5), list(p)]) for p in permutations(range(5)))


@pytest.mark.parametrize("seed", range(5))
def test_stages_stand_in_the_best_order(seed: int) -> None:
    between = distances(6, seed)
    seat = np.random.default_rng(seed + 50).uniform(0, 4, (6, 6))
    order = order_stages(between, seat)
    best_s = min(path_s(other, between, seat) for other in permutations(range(6)))
    assert path_s(tuple(order), between, seat) == pytest.approx(best_s)
    assert path_s(tuple(range(6)), between, seat) > best_s  # else the instance shows nothing


@pytest.mark.parametrize("seed", range(5))
def test_many_stages_are_ordered_almost_as_well_by_exchanges(seed: int) -> None:
    between, seat = distances(9, seed), np.zeros((9, 9))
    exact_s = path_s(tuple(order_stages(between, seat)), between, seat)
    local_s = path_s(tuple(_improve_order(list(range(9)), between, seat)), between, seat)
    assert exact_s - 1e-9 <= local_s <= 1.25 * exact_s
    assert sorted(order_stages(distances(14, seed), np.zeros((14, 14)))) == list(range(14))


def test_pairing_keeps_the_stages_and_never_costs_more() -> None:
    hop, grid = distances(24, 3), np.random.default_rng(3).permutation(24).reshape(4, 6)
    paired = pair_hops(grid, hop)
    assert [set(row) for row in paired] == [set(row) for row in grid]
    after = hop[paired[:-1], paired[1:]].max(axis=1)
    assert (after <= hop[grid[:-1], grid[1:]].max(axis=1)).all()
    between = stage_distances(grid, hop)
    assert after == pytest.approx([between[s, s + 1] for s in range(3)])


def test_polish_lowers_the_hops_and_leaves_pins_in_their_stage() -> None:
    hop, grid = distances(24, 4), np.random.default_rng(4).permutation(24).reshape(4, 6)
    pin, charge = np.full(24, -1), np.zeros((24, 4))
    before = hop[grid[:-1], grid[1:]].max(axis=1).sum()
    free = polish(grid, hop, charge, pin)
    assert hop[free[:-1], free[1:]].max(axis=1).sum() < before
    assert set(free[0]) != set(grid[0])
    pin[grid[0, 0]] = 0
    assert set(polish(grid, hop, charge, pin)[0]) == set(grid[0])


def test_a_dear_move_keeps_every_stage_in_its_place() -> None:
    hop, grid = distances(24, 4), np.random.default_rng(4).permutation(24).reshape(4, 6)
    charge = np.full((24, 4), 100.0)
    charge[grid, np.arange(4)[:, None]] = 0.0
    polished = polish(grid, hop, charge, np.full(24, -1))
    assert [set(row) for row in polished] == [set(row) for row in grid]


def test_seeds_use_each_node_once() -> None:
    hop, nodes = distances(30, 1), np.arange(2, 26)
    for grid in (
        seeds.pipelines_together(nodes, hop, 4, 6),
        seeds.stages_together(nodes, hop, 4, 6),
        seeds.greedy(nodes, hop, 4, 6),
        seeds.shuffled(nodes, 4, 6, np.random.default_rng(0)),
    ):
        assert grid.shape == (4, 6)
        assert sorted(grid.ravel()) == list(nodes)


def test_near_nodes_go_together_in_the_seeds_and_in_blocks() -> None:
    place = np.repeat(np.arange(6), 4)
    hop = np.where(place[:, None] == place, 1.0, 9.0)
    mixed = np.random.default_rng(2).permutation(24)
    together = seeds.stages_together(mixed, hop, 6, 4)
    assert all(len(set(place[row])) == 1 for row in together)
    lanes = seeds.pipelines_together(mixed, hop, 4, 6)
    assert all(len(set(place[lane])) == 1 for lane in lanes.T)
    coarse = multilevel.coarsen(mixed, hop, hop, 2)
    assert all(len(set(place[block])) == 1 for block in coarse.members)
    unfolded = coarse.unfold(np.arange(12).reshape(3, 4))
    assert unfolded.shape == (3, 8)
    assert sorted(unfolded.ravel()) == list(range(24))


def test_blocks_divide_the_slots() -> None:
    assert multilevel.block_size(16, 256, 64) == 4
    assert multilevel.block_size(8, 64, 64) == 1
    assert multilevel.block_size(7, 700, 50) == 7
