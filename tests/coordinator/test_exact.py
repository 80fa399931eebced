"""The exact method against brute force and against an independent constraint program."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
from numpy.typing import NDArray
from ortools.sat.python import cp_model

from swarmnode.coordinator.solver.grid.exact import Exact, exact_grid
from swarmnode.errors import CapacityError

Floats = NDArray[np.float64]
Slots = Sequence[Sequence[int]]

SHAPES = ((1, 1), (1, 4), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (5, 1), (2, 4), (4, 2), (7, 1))


def grid_cost(
    reduce_s: Floats, hop_s: Floats, slots: Slots, charge_s: Floats | None = None
) -> float:
    """The objective, straight from its definition."""
    dearest = max(sum(reduce_s[a, b] for b in row if b != a) for row in slots for a in row)
    hops = sum(max(hop_s[a, b] for a, b in zip(*pair, strict=True)) for pair in pairwise(slots))
    charges = 0.0 if charge_s is None else sum(
        charge_s[a, stage] for stage, row in enumerate(slots) for a in row
    )  # fmt: skip
    return dearest + hops + charges


def grids(nodes: tuple[int, ...], num_stages: int, num_slots: int) -> Iterator[list[set[int]]]:
    """Every way to give the stages a set of nodes each."""
    if not num_stages:
        yield []
        return
    for group in combinations(nodes, num_slots):
        rest = tuple(node for node in nodes if node not in group)
        for others in grids(rest, num_stages - 1, num_slots):
            yield [set(group), *others]


def brute_force(
    reduce_s: Floats,
    hop_s: Floats,
    num_stages: int,
    num_slots: int,
    charge_s: Floats | None = None,
    pins: Mapping[int, int] | None = None,
) -> float:
    """The least cost over all sets and all pairings; inf if nothing is feasible."""
    best = np.inf
    for groups in grids(tuple(range(len(reduce_s))), num_stages, num_slots):
        if any(node not in groups[stage] for node, stage in (pins or {}).items()):
            continue
        slots = [sorted(group) for group in groups]
        hops = sum(
            min(max(hop_s[a, b] for a, b in zip(left, order, strict=True))
                for order in permutations(right))
            for left, right in pairwise(slots)
        )  # fmt: skip
        alone = np.zeros_like(hop_s)
        best = min(best, hops + grid_cost(reduce_s, alone, slots, charge_s))
    return best


def random_swarm(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Costs with ties, clusters, one-way differences and missing links, by the seed."""
    random = np.random.default_rng(seed)
    place = random.integers(0, 3, count)
    base = random.uniform(0.1, 5.0, (3, 3))[np.ix_(place, place)]
    noise = random.uniform(0.5, 2.0, (count, count)) if seed % 3 else np.ones((count, count))
    reduce_s = np.where(seed % 2, base + base.T, 1.0) * noise
    hop_s = (base + base.T) * (noise + noise.T)
    if seed % 5 == 0:
        missing = np.triu(random.random((count, count)) < 0.2, 1)
        hop_s[missing | missing.T] = np.inf
        reduce_s[random.random((count, count)) < 0.15] = np.inf
    np.fill_diagonal(reduce_s, 0.0)
    np.fill_diagonal(hop_s, 0.0)
    return reduce_s, hop_s


def assert_valid(
    found: Exact,
    reduce_s: Floats,
    hop_s: Floats,
    num_stages: int,
    num_slots: int,
    charge_s: Floats | None = None,
) -> None:
    nodes = [node for row in found.slots for node in row]
    assert [len(row) for row in found.slots] == [num_slots] * num_stages
    assert len(set(nodes)) == len(nodes)
    real_s = grid_cost(reduce_s, hop_s, found.slots, charge_s)
    assert found.cost_s == pytest.approx(real_s, rel=1e-12)


@pytest.mark.parametrize(("num_stages", "num_slots"), SHAPES)
@pytest.mark.parametrize("seed", range(6))
def test_the_optimum_is_that_of_brute_force(num_stages: int, num_slots: int, seed: int) -> None:
    size = num_stages * num_slots
    count = min(size + seed % 3, 8 if size < 7 else size)
    reduce_s, hop_s = random_swarm(seed, count)
    expected = brute_force(reduce_s, hop_s, num_stages, num_slots)
    found = exact_grid(reduce_s, hop_s, num_stages, num_slots)
    if found is None:
        assert expected == np.inf
        return
    assert found.cost_s == pytest.approx(expected, rel=1e-12)
    assert_valid(found, reduce_s, hop_s, num_stages, num_slots)


@pytest.mark.parametrize(("num_stages", "num_slots"), [(1, 3), (2, 2), (2, 3), (3, 2), (4, 1)])
@pytest.mark.parametrize("seed", range(6))
def test_charges_and_pins_are_part_of_the_optimum(
    num_stages: int, num_slots: int, seed: int
) -> None:
    random = np.random.default_rng(100 + seed)
    count = num_stages * num_slots + seed % 2
    reduce_s, hop_s = random_swarm(seed, count)
    charge_s = random.uniform(0.0, 4.0, (count, num_stages)) * (random.random(count) < 0.6)[:, None]
    pins = {0: seed % num_stages} if seed % 3 else {}
    expected = brute_force(reduce_s, hop_s, num_stages, num_slots, charge_s, pins)
    found = exact_grid(reduce_s, hop_s, num_stages, num_slots, charge_s=charge_s, pins=pins)
    if found is None:
        assert expected == np.inf
        return
    assert found.cost_s == pytest.approx(expected, rel=1e-12)
    assert all(node in found.slots[stage] for node, stage in pins.items())
    assert_valid(found, reduce_s, hop_s, num_stages, num_slots, charge_s)


def constraint_program(reduce_s: Floats, hop_s: Floats, num_stages: int, num_slots: int) -> int:
    """The least cost of whole-number matrices, by CP-SAT with one variable per node and slot."""
    model = cp_model.CpModel()
    nodes, stages, slots = range(len(reduce_s)), range(num_stages), range(num_slots)
    top = int(reduce_s.sum() + hop_s.sum())
    at = {(n, s, v): model.new_bool_var("") for n in nodes for s in stages for v in slots}
    for n in nodes:
        model.add_at_most_one(at[n, s, v] for s in stages for v in slots)
    for s in stages:
        for v in slots:
            model.add_exactly_one(at[n, s, v] for n in nodes)
    dearest = model.new_int_var(0, top, "")
    hops = [model.new_int_var(0, top, "") for _ in range(num_stages - 1)]
    within = {(n, s): sum(at[n, s, v] for v in slots) for n in nodes for s in stages}
    for s in stages:
        for n in nodes:
            row = sum(int(reduce_s[n, m]) * within[m, s] for m in nodes if m != n)
            model.add(dearest >= row - top * (1 - within[n, s]))
        for v in slots:
            for n, m in combinations(nodes, 2) if s + 1 < num_stages else ():
                for a, b in ((n, m), (m, n)):
                    both = [at[a, s, v], at[b, s + 1, v]]
                    model.add(hops[s] >= int(hop_s[a, b])).only_enforce_if(both)
    model.minimize(dearest + sum(hops))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    assert solver.solve(model) == cp_model.OPTIMAL
    return int(solver.objective_value)


@pytest.mark.parametrize(
    ("count", "num_stages", "num_slots"), [(9, 3, 3), (9, 4, 2), (10, 5, 2), (12, 2, 6), (12, 4, 2)]
)
def test_the_optimum_is_that_of_a_constraint_program(
    count: int, num_stages: int, num_slots: int
) -> None:
    random = np.random.default_rng(count * num_stages)
    hop_s = np.triu(random.integers(1, 60, (count, count)), 1).astype(float)
    hop_s += hop_s.T
    reduce_s = random.integers(1, 60, (count, count)).astype(float)
    np.fill_diagonal(reduce_s, 0.0)
    found = exact_grid(reduce_s, hop_s, num_stages, num_slots)
    assert found is not None
    assert found.cost_s == constraint_program(reduce_s, hop_s, num_stages, num_slots)
    assert_valid(found, reduce_s, hop_s, num_stages, num_slots)


def test_an_island_that_must_be_used_has_no_answer() -> None:
    reduce_s, hop_s = random_swarm(1, 6)
    hop_s[0, :] = hop_s[:, 0] = np.inf
    assert exact_grid(reduce_s, hop_s, 3, 2) is None
    assert exact_grid(reduce_s, hop_s, 2, 2) is not None


def test_pins_that_no_grid_can_obey_have_no_answer() -> None:
    reduce_s, hop_s = random_swarm(1, 6)
    assert exact_grid(reduce_s, hop_s, 3, 2, pins={0: 0, 1: 0, 2: 0}) is None


@pytest.mark.parametrize(("count", "num_stages", "num_slots"), [(17, 4, 4), (7, 4, 2)])
def test_a_swarm_of_the_wrong_size_is_refused(count: int, num_stages: int, num_slots: int) -> None:
    reduce_s, hop_s = random_swarm(1, count)
    with pytest.raises(CapacityError, match=f"{count} nodes"):
        exact_grid(reduce_s, hop_s, num_stages, num_slots)
