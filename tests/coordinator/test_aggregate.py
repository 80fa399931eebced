"""Types of nodes, and the program that counts them, against the exact method."""

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.networks import dtfm_case, irregular_swarm
from swarmnode.coordinator.solver.grid.aggregate import Aggregated, aggregate_grid
from swarmnode.coordinator.solver.grid.exact import exact_grid
from swarmnode.coordinator.solver.grid.types import group_nodes, typed_costs
from swarmnode.errors import CapacityError
from tests.coordinator.test_bounds import dtfm_costs

Floats = NDArray[np.float64]


def blocks(seed: int, count: int) -> tuple[Floats, Floats]:
    """A few types with any costs among them, one way or both; nodes in random order."""
    random = np.random.default_rng(seed)
    kinds = 2 + seed % 3
    place = random.integers(0, kinds, count)
    reduce_KK, hop_KK = random.integers(1, 40, (2, kinds, kinds)).astype(float)
    hop_KK += hop_KK.T
    if seed % 4 == 0:
        hop_KK[0, 1] = hop_KK[1, 0] = np.inf
        reduce_KK[1, 0] = np.inf
    reduce_s, hop_s = (table[np.ix_(place, place)].copy() for table in (reduce_KK, hop_KK))
    np.fill_diagonal(reduce_s, 0.0)
    np.fill_diagonal(hop_s, 0.0)
    return reduce_s, hop_s


def real_cost(reduce_s: Floats, hop_s: Floats, found: Aggregated) -> float:
    assert found.slots is not None
    dearest = max(sum(reduce_s[a, b] for b in row if b != a) for row in found.slots for a in row)
    pairs = [zip(*rows, strict=True) for rows in pairwise(found.slots)]
    return float(dearest + sum(max(hop_s[a, b] for a, b in hop) for hop in pairs))


@pytest.mark.parametrize(("num_stages", "num_slots"), [(1, 4), (2, 3), (3, 3), (4, 2), (5, 1)])
@pytest.mark.parametrize("seed", range(10))
def test_counting_types_finds_and_proves_the_optimum(
    num_stages: int, num_slots: int, seed: int
) -> None:
    reduce_s, hop_s = blocks(seed, num_stages * num_slots + seed % 3)
    best = exact_grid(reduce_s, hop_s, num_stages, num_slots)
    found = aggregate_grid(reduce_s, hop_s, num_stages, num_slots)
    if best is None:
        assert found.slots is None
        return
    nodes = [node for row in found.slots or () for node in row]
    assert len(set(nodes)) == len(nodes) == num_stages * num_slots
    assert found.is_optimal
    assert found.cost_s == pytest.approx(best.cost_s, rel=1e-12)
    assert found.cost_s == pytest.approx(real_cost(reduce_s, hop_s, found), rel=1e-12)
    assert best.cost_s * (1 - 1e-4) <= found.bound_s <= best.cost_s


@pytest.mark.parametrize(
    ("case", "optimum_s"), [(0, 3.4398), (1, 31.6341), (2, 16.0868), (3, 34.8020)]
)
def test_the_cases_of_dtfm_with_few_types_are_proven(case: int, optimum_s: float) -> None:
    costs = dtfm_costs(dtfm_case(case), 8)
    found = aggregate_grid(*costs, 8, 8)
    assert found.is_optimal
    assert found.cost_s == pytest.approx(optimum_s, abs=6e-5)
    assert found.cost_s == pytest.approx(real_cost(*costs, found), rel=1e-12)


def test_a_known_optimum_is_confirmed_and_a_poor_one_is_beaten() -> None:
    costs = dtfm_costs(dtfm_case(2), 8)
    best = aggregate_grid(*costs, 8, 8)
    again = aggregate_grid(*costs, 8, 8, known_cost_s=best.cost_s, hint=best.slots)
    assert again.is_optimal
    assert again.cost_s == pytest.approx(best.cost_s, rel=1e-12)
    poor = aggregate_grid(*costs, 8, 8, known_cost_s=3 * best.cost_s)
    assert poor.cost_s == pytest.approx(best.cost_s, rel=1e-5)


def test_without_time_the_bound_is_weak_but_holds_and_nothing_is_called_optimal() -> None:
    costs = dtfm_costs(dtfm_case(4), 8)
    found = aggregate_grid(*costs, 8, 8, effort=0.1)
    assert not found.is_optimal
    assert 0 <= found.bound_s < 49.2184
    assert found == aggregate_grid(*costs, 8, 8, effort=0.1)


def test_a_swarm_of_many_types_is_refused() -> None:
    with pytest.raises(CapacityError, match="types"):
        aggregate_grid(*dtfm_costs(irregular_swarm(20, 0), 4), 4, 4)


def test_a_type_is_a_box_and_all_machines_of_one_gpu_are_one_type() -> None:
    typed = typed_costs(*dtfm_costs(dtfm_case(1), 8))
    assert sorted(len(nodes) for nodes in typed.members) == [4] * 8 + [32]
    assert typed.num_types == 9


def test_nodes_of_a_type_may_see_each_other_at_another_price_than_anybody_else() -> None:
    cost_s = np.full((4, 4), 3.0)
    cost_s[0, 1] = cost_s[1, 0] = 1.0
    assert group_nodes(cost_s) == ((0, 1), (2, 3))
    cost_s[0, 1] = 2.0
    assert group_nodes(cost_s) == ((0,), (1,), (2, 3))


def test_near_identical_nodes_are_one_type_only_within_the_tolerance() -> None:
    cost_s = np.full((5, 5), 2.0)
    cost_s[0, :] = cost_s[:, 0] = 2.06
    assert group_nodes(cost_s) == ((0,), (1, 2, 3, 4))
    assert group_nodes(cost_s, tolerance=0.05) == ((0, 1, 2, 3, 4),)
    assert typed_costs(cost_s, cost_s, tolerance=0.05).hop_s == pytest.approx(np.array([[2.0]]))
    cost_s[0, 3] = np.inf
    assert group_nodes(cost_s, tolerance=0.05)[0] == (0,)
