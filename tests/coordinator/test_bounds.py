"""The bound is never above the optimum, and often close to it."""

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.networks import dtfm_case, irregular_swarm
from swarmnode.coordinator.bounds import grid_bound
from swarmnode.coordinator.solver.grid.exact import exact_grid
from swarmnode.coordinator.topology import Topology

Floats = NDArray[np.float64]
SHAPES = ((1, 3), (2, 2), (2, 3), (3, 2), (4, 2), (2, 4), (3, 3), (5, 1), (4, 1), (1, 1), (8, 1))
ACTIVATION_BYTES = 2024 * 2048 * 2 * 61.03515625 / 2**30 * 1e9


def dtfm_costs(topology: Topology, num_slots: int) -> tuple[Floats, Floats]:
    """Reduction and hop costs of DT-FM (Yuan et al., arXiv:2206.01288)."""
    reduce_s = 2 * topology.transfer_s(0.65e9 / num_slots)
    return reduce_s, 2 * topology.transfer_s(ACTIVATION_BYTES)


def small_swarm(seed: int) -> tuple[Floats, Floats, int, int]:
    """Clusters, ties, one-way differences, missing links and spare nodes, by the seed."""
    random = np.random.default_rng(seed)
    num_stages, num_slots = SHAPES[seed % len(SHAPES)]
    count = min(num_stages * num_slots + int(random.integers(0, 4)), 10)
    place = random.integers(0, 3, count)
    near = random.uniform(0.1, 5.0, (3, 3))
    np.fill_diagonal(near, random.uniform(0.0, 1.0))
    hop_s = (near + near.T)[np.ix_(place, place)]
    if seed % 3:
        hop_s = hop_s * random.uniform(0.5, 2.0, (count, count))
        hop_s = np.maximum(hop_s, hop_s.T)
    reduce_s = hop_s * random.uniform(0.2, 3.0)
    if seed % 2:
        reduce_s = reduce_s * random.uniform(0.7, 1.4, (count, count))
    if seed % 5 == 0:
        missing = np.triu(random.random((count, count)) < 0.3, 1)
        hop_s[missing | missing.T] = np.inf
        reduce_s[random.random((count, count)) < 0.1] = np.inf
    np.fill_diagonal(hop_s, 0.0)
    np.fill_diagonal(reduce_s, 0.0)
    return reduce_s, hop_s, num_stages, num_slots


def share(seed: int) -> float:
    """The bound over the optimum of a small swarm; 1 if both say that nothing works."""
    reduce_s, hop_s, num_stages, num_slots = small_swarm(seed)
    bound = grid_bound(reduce_s, hop_s, num_stages, num_slots)
    best = exact_grid(reduce_s, hop_s, num_stages, num_slots)
    if best is None or best.cost_s == 0:
        return 1.0 if best is None or bound.seconds <= 0 else np.inf
    return bound.seconds / best.cost_s


@pytest.mark.parametrize("block", range(10))
def test_the_bound_is_never_above_the_optimum(block: int) -> None:
    shares = [share(seed) for seed in range(100 * block, 100 * block + 100)]
    assert max(shares) <= 1.0
    assert np.mean(shares) > 0.75


def test_a_bound_raised_by_a_hundredth_would_be_caught() -> None:
    assert max(1.01 * share(seed) for seed in range(100)) > 1.0


@pytest.mark.parametrize(
    ("case", "optimum_s"), [(0, 3.4398), (1, 31.6341), (2, 16.0868), (3, 34.8020)]
)
def test_the_bound_meets_the_optimum_where_the_network_is_made_of_blocks(
    case: int, optimum_s: float
) -> None:
    bound = grid_bound(*dtfm_costs(dtfm_case(case), 8), 8, 8)
    assert bound.seconds == pytest.approx(optimum_s, abs=6e-5)


def test_the_bound_of_the_worldwide_network_is_within_a_fifth_of_the_best_known() -> None:
    assert 0.8 * 49.2184 <= grid_bound(*dtfm_costs(dtfm_case(4), 8), 8, 8).seconds <= 49.2184


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_of_an_irregular_swarm_is_more_than_half_of_the_optimum(seed: int) -> None:
    costs = dtfm_costs(irregular_swarm(12, seed), 4)
    best = exact_grid(*costs, 3, 4)
    assert best is not None
    assert 0.6 * best.cost_s <= grid_bound(*costs, 3, 4).seconds <= best.cost_s


def test_islands_too_small_for_the_grid_are_proven_to_hold_none() -> None:
    hop_s = np.ones((6, 6))
    hop_s[:3, 3:] = hop_s[3:, :3] = np.inf
    assert grid_bound(np.ones((6, 6)), hop_s, 6, 1).seconds == np.inf
    assert np.isfinite(grid_bound(np.ones((6, 6)), hop_s, 3, 1).seconds)
