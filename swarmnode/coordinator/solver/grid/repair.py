"""Repair of a running grid: few nodes change their stage, and the lanes are always drawn best.

Most runs move nodes between stages and pair the hops exactly (`regroup`); at a sensible charge
such runs nearly always end at the same grid. Some go over the lanes (`annealing`), which is
better where charges are low and the answer is far away.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swarmnode.coordinator.solver.grid import polish, regroup
from swarmnode.coordinator.solver.grid.pairing import FREE
from swarmnode.coordinator.solver.grid.portfolio import (
    CHUNK_MOVES,
    COOLED,
    LONGEST_RUN,
    Budget,
    Elites,
    Schedule,
    anneal_from,
)
from swarmnode.coordinator.solver.grid.problem import GridProblem

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NUM_RUNS = 8
REGROUP = (Schedule(4e-3, 2e-4, 0.3), Schedule(2e-3, 1e-4, 0.1), Schedule(6e-3, 2e-4, 0.5))
LANES = (Schedule(3e-3, 2e-4, 0.5), Schedule(1.6e-3, 8e-5, 0.5), Schedule(1e-3, 8e-5, 0.5))
"""Hot enough to leave a placement: the way to a few good moves leads through many."""
LANES_EVERY = 4
"""One run in so many goes over the lanes."""
SLOTS_PER_MOVE = 4
"""A move between stages takes as long as one over the lanes for so many slots of a stage."""
DEARER = 4e-3
"""What each node above the limit costs while a run goes on, as a share like the temperatures."""


@dataclass(frozen=True)
class Limit:
    """At most `most` nodes that have a home are in another stage; None for any number."""

    home: Ints
    most: int | None

    def allows(self, grid: Ints) -> bool:
        home = self.home[grid]
        away = (home != FREE) & (home != np.arange(len(grid))[:, None])
        return self.most is None or int(away.sum()) <= self.most

    def polished(self, problem: GridProblem, grid: Ints) -> Ints:
        """Stages in their best order if that is allowed; hops paired best."""
        paired = polish.pair_hops(grid, problem.hop_s)
        grids = [grid, paired, problem.polished(grid)]
        return min((g for g in grids if self.allows(g) or g is grid), key=problem.cost)


def repair_grids(
    problem: GridProblem, starts: Sequence[Ints], budget: Budget, most_moved: int | None = None
) -> Ints:
    """The best grid that the budget finds from `starts`: cost and charges; as good as they are.

    Deterministic for the budget's seed and moves. A move between
    stages counts as V / SLOTS_PER_MOVE.
    most_moved: how many nodes may leave the stage where they are charged least.
    """
    elites, limit = Elites(), Limit(homes(problem.charge_s), most_moved)
    for grid in starts:
        elites.offer(problem, limit.polished(problem, grid))
    longest = LONGEST_RUN * max(64, problem.num_nodes) // 64
    moves, count = max(1, min(budget.left // NUM_RUNS, longest)), 0
    while budget.left > 0:
        run, seed = min(moves, budget.left), _seed(budget, count)
        lap, place = divmod(count, LANES_EVERY)
        # Later laps begin at what was found, turn about with the start.
        froms = [grid for _, grid in elites.grids] if count % 2 else list(starts)
        grid = froms[lap % len(froms)]
        if place == LANES_EVERY - 1:
            schedule = LANES[lap % len(LANES)]
            found = anneal_from(problem, grid, schedule, run, seed, budget)
        else:
            schedule = REGROUP[(lap + place) % len(REGROUP)]
            found = regroup_from(problem, grid, schedule, run, seed, budget, limit)
        if limit.allows(found):
            elites.offer(problem, found)
        count += 1
    return elites.grids[0][1]


def regroup_from(
    problem: GridProblem, grid: Ints, schedule: Schedule, moves: int, seed: int, budget: Budget,
    limit: Limit,
) -> Ints:  # fmt: skip
    """One run between stages that spends `moves`; never worse than `grid`.

    Shapes: (S, V) -> (S, V). It stops between chunks when the budget says so.
    """
    stages, slots = grid.shape
    spare = np.setdiff1d(np.arange(problem.num_nodes), grid)
    at = np.concatenate([grid.ravel(), spare]).astype(np.int64)
    best = at.copy()
    knobs = _knobs(problem, grid, schedule, limit.most)
    scratch = (
        np.zeros((stages, slots)), np.zeros(stages), np.zeros(stages),
        np.zeros((stages, slots), np.int64), np.zeros((stages, slots), np.int64),
    )  # fmt: skip
    word = np.array([seed * 2 + 1], dtype=np.uint64)
    row_in = np.ascontiguousarray(problem.reduce_s.T)
    each = max(1, slots // SLOTS_PER_MOVE)
    total, chunk, done = max(1, moves // each), max(1, CHUNK_MOVES // each), 0
    while done < total and not budget.is_stopped:
        stop = min(total, done + chunk)
        least_s = regroup.regroup(
            at, row_in, problem.reduce_s, problem.hop_s, problem.charge_s, problem.pin, limit.home,
            *scratch, best, knobs, word, done, stop, total,
        )  # fmt: skip
        last = stop == total
        budget.spend(moves - done * each if last else (stop - done) * each, least_s)
        done = stop
    found = limit.polished(problem, best[: stages * slots].reshape(stages, slots))
    return found if problem.cost(found) <= problem.cost(grid) else grid


def homes(charge_s: Floats) -> Ints:
    """The stage where a node is charged least, -1 if all are equal. Shapes: (N, S) -> (N,)."""
    bound = charge_s.min(axis=1) < charge_s.max(axis=1)
    return np.where(bound, charge_s.argmin(axis=1), FREE).astype(np.int64)


def _knobs(problem: GridProblem, grid: Ints, schedule: Schedule, most: int | None) -> Floats:
    """Temperatures in seconds, the blend and when it ends, the cost to beat, and the limit."""
    unit_s = problem.scale_s * 64.0 / grid.size
    ends_s = [max(end * unit_s, 1e-12) for end in (schedule.hottest, schedule.coldest)]
    limit = (np.inf, 0.0) if most is None else (float(most), DEARER * unit_s)
    return np.array([*ends_s, schedule.blend, COOLED, problem.cost(grid), *limit])


def _seed(budget: Budget, count: int) -> int:
    """A start for the kernel's own generator: another for each run."""
    return int(np.random.default_rng([budget.effort.seed, count]).integers(1, 2**62))
