import threading

import numpy as np
import pytest

from benchmarks.networks import irregular_swarm
from swarmnode.coordinator.objective import Effort
from swarmnode.coordinator.solver.grid import nearest, pairing, polish
from swarmnode.coordinator.solver.grid.dtfm import DtfmObjective
from swarmnode.coordinator.solver.grid.portfolio import Budget, Schedule
from swarmnode.coordinator.solver.grid.problem import GridProblem
from swarmnode.coordinator.solver.grid.regroup import regroup
from swarmnode.coordinator.solver.grid.repair import Limit, homes, regroup_from
from swarmnode.coordinator.solver.grid.tournament import search_stages

STAGES, SLOTS, NODES = 4, 6, 27


@pytest.fixture(scope="module")
def problem() -> GridProblem:
    return DtfmObjective(irregular_swarm(NODES, 6), STAGES, SLOTS)._free


def bottleneck(problem: GridProblem, at: np.ndarray, h: int) -> float:
    rows = at[: STAGES * SLOTS].reshape(STAGES, SLOTS)
    return polish.pair_up(problem.hop_s[np.ix_(rows[h], rows[h + 1])])[1]


def test_a_hop_that_is_paired_step_by_step_is_paired_best(problem: GridProblem) -> None:
    at = np.random.default_rng(1).permutation(NODES)
    partner, back = (np.full((STAGES, SLOTS), pairing.FREE) for _ in range(2))
    reach, came, done = np.empty(SLOTS), np.empty(SLOTS, np.int64), np.empty(SLOTS, np.int64)
    for h in range(STAGES - 1):
        args = (at, problem.hop_s, partner, back, h)
        best_s = bottleneck(problem, at, h)
        assert np.isinf(pairing.settle(*args, 0.0, best_s * 0.999, reach, came, done))
        assert pairing.settle(*args, 0.0, np.inf, reach, came, done) == best_s
        assert sorted(partner[h]) == list(range(SLOTS))


def test_no_hop_is_quicker_than_its_floor_and_floors_are_often_reached(
    problem: GridProblem,
) -> None:
    random = np.random.default_rng(2)
    at, num_reached = random.permutation(NODES), 0
    low, lone = np.empty((NODES, STAGES)), np.empty((STAGES, 2), np.int64)
    ways = np.empty((STAGES, 2, 2))
    for n in range(NODES):
        for s in range(STAGES):
            nearest.find_low(at, problem.hop_s, low, SLOTS, n, s)
    kept = (at, problem.hop_s, low, lone, ways, SLOTS)
    for _ in range(300):
        h, u, v = (int(x) for x in random.integers(0, (STAGES - 1, SLOTS, SLOTS)))
        nearest.find_lone(at, low, lone, ways, SLOTS, h)
        p, q = h * SLOTS + u, (h + 1) * SLOTS + v
        a, b = int(at[p]), int(at[q])
        floor_s = nearest.floor_of_hop(*kept, h, u, v, b, a)
        at[p], at[q] = b, a
        nearest.change_lows(at, problem.hop_s, low, SLOTS, h, a, b)
        nearest.change_lows(at, problem.hop_s, low, SLOTS, h + 1, b, a)
        assert floor_s <= bottleneck(problem, at, h)
        num_reached += floor_s == bottleneck(problem, at, h)
    assert num_reached > 60


def test_the_cost_that_a_run_reports_is_that_of_its_best_nodes(problem: GridProblem) -> None:
    charged = problem.charged(np.random.default_rng(3).uniform(0, 1, (NODES, STAGES)))
    at = np.arange(NODES)
    best, free = at.copy(), np.full(NODES, pairing.FREE)
    scratch = np.zeros((STAGES, SLOTS)), np.zeros(STAGES), np.zeros(STAGES)
    pairs = np.zeros((STAGES, SLOTS), np.int64), np.zeros((STAGES, SLOTS), np.int64)
    knobs = np.array([2.0, 0.1, 0.5, 0.8, 1e9, np.inf, 0.0])
    least_s = regroup(
        at, np.ascontiguousarray(charged.reduce_s.T), charged.reduce_s, charged.hop_s,
        charged.charge_s, charged.pin, free, *scratch, *pairs, best, knobs,
        np.array([9], dtype=np.uint64), 0, 20_000, 20_000,
    )  # fmt: skip
    grid = polish.pair_hops(best[: STAGES * SLOTS].reshape(STAGES, SLOTS), charged.hop_s)
    assert least_s == pytest.approx(charged.cost(grid))
    assert sorted(best) == list(range(NODES))
    assert least_s < charged.cost(np.arange(STAGES * SLOTS).reshape(STAGES, SLOTS))


@pytest.mark.parametrize("moves", [1, 3, 20_001])
def test_a_run_spends_what_it_was_given(problem: GridProblem, moves: int) -> None:
    grid = np.arange(STAGES * SLOTS).reshape(STAGES, SLOTS)
    budget = Budget(Effort(moves=moves))
    limit = Limit(homes(problem.charge_s), None)
    found = regroup_from(problem, grid, Schedule(2e-3, 2e-4, 0.3), moves, 1, budget, limit)
    assert budget.spent == moves
    assert problem.cost(found) <= problem.cost(grid)


def test_the_streams_of_a_cold_search_report_one_after_the_other(problem: GridProblem) -> None:
    told, inside = [], threading.Lock()

    def report(share: float, best_s: float) -> None:
        assert inside.acquire(blocking=False)
        told.append((share, best_s))
        inside.release()

    starts = [np.arange(STAGES * SLOTS).reshape(STAGES, SLOTS)]
    budget = Budget(Effort(moves=600_001, report=report))
    found = search_stages(problem, starts, budget)
    assert budget.spent == 600_001
    assert told == sorted(told, key=lambda at: (at[0], -at[1]))
    assert told[-1][0] == 1.0
    again = search_stages(problem, starts, Budget(Effort(moves=600_001)))
    assert (found == again).all()
