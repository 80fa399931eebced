"""A cold search between stages: short runs from many places, then longer ones from the best.

How good a grid can be hangs on a choice that a run seldom takes back: stages of near nodes with a
long hop somewhere, or mixed stages with short hops. So runs begin at simple grids of both kinds,
at folded ones and at random ones. Even so luck decides which kind is found; two streams of their
own seeds, each in a thread, halve it.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from swarmnode.coordinator.objective import Effort
from swarmnode.coordinator.solver.grid import seeds
from swarmnode.coordinator.solver.grid.portfolio import (
    Budget,
    Elites,
    Schedule,
    can_fold,
    folded,
    word_of,
)
from swarmnode.coordinator.solver.grid.problem import GridProblem
from swarmnode.coordinator.solver.grid.repair import Limit, homes, regroup_from

Ints = NDArray[np.int64]

NUM_STREAMS = 2
"""Fixed, so that the answer does not depend on the machine; one core does them in turns."""
HOT, WARM, MILD = Schedule(3e-3, 2e-4, 0.3), Schedule(2e-3, 2e-4, 0.3), Schedule(1e-3, 2e-4, 0.3)
"""From random grids, from simple ones, and from those that are good already."""
REHEATS = (MILD, Schedule(1.5e-3, 2e-4, 0.3), Schedule(7e-4, 2e-4, 0.3))
NUM_FOLDED, NUM_RANDOM, NUM_ELITES = 4, 2, 4
EXPLORING_SHARE = 0.4
"""Of the moves: until every beginning had its first run."""
NUM_REHEATS = 11


@dataclass
class Stream(Budget):
    """A part of another budget, spent by a thread of its own."""

    whole: Budget = field(kw_only=True)
    lock: Lock = field(kw_only=True)

    def spend(self, moves: int, cost_s: float) -> None:
        """Count moves here and in the whole, one thread after the other."""
        self.spent += moves
        with self.lock:
            self.whole.spend(moves, cost_s)
            self.is_stopped = self.whole.is_stopped


def search_stages(problem: GridProblem, starts: Sequence[Ints], budget: Budget) -> Ints:
    """The best grid that the budget finds, at least as good as the best of `starts`.

    Deterministic for the budget's seed and moves; whoever stops it early gets the best so far.
    `should_stop` and `report` are called by other threads, one at a time.
    """
    lock, left, seed = Lock(), budget.left, budget.effort.seed
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        runs = []
        for number in range(NUM_STREAMS):
            moves = left * (number + 1) // NUM_STREAMS - left * number // NUM_STREAMS
            effort = Effort(moves, seed, should_stop=lambda: budget.is_stopped)
            stream = Stream(effort, whole=budget, lock=lock)
            random = np.random.default_rng([seed, number])
            runs.append(pool.submit(_search, problem, starts, stream, random))
        return min((run.result() for run in runs), key=problem.cost)


def _search(
    problem: GridProblem, starts: Sequence[Ints], budget: Budget, random: np.random.Generator
) -> Ints:
    limit, elites = Limit(homes(problem.charge_s), None), Elites(NUM_ELITES)
    for grid in starts:
        elites.offer(problem, grid)
    count = 2 * len(starts) + NUM_FOLDED + NUM_RANDOM
    moves = max(1, int(EXPLORING_SHARE * budget.left) // count)
    for grid, schedule in _begins(problem, starts, moves, random, budget):
        run = min(moves, budget.left)
        found = regroup_from(problem, grid, schedule, run, word_of(random), budget, limit)
        elites.offer(problem, found)
        if budget.left == 0:
            break
    moves, count = max(1, budget.left // NUM_REHEATS), 0
    while budget.left > 0:
        _, grid = elites.grids[count % len(elites.grids)]
        schedule, run = REHEATS[count % len(REHEATS)], min(moves, budget.left)
        found = regroup_from(problem, grid, schedule, run, word_of(random), budget, limit)
        elites.offer(problem, found)
        count += 1
    return elites.grids[0][1]


def _begins(
    problem: GridProblem, starts: Sequence[Ints], moves: int, random: np.random.Generator,
    budget: Budget,
) -> Iterator[tuple[Ints, Schedule]]:  # fmt: skip
    """Where first runs begin, and how hot; `moves` go into a fold before it is a beginning."""
    grids = [problem.polished(grid) for grid in starts]
    yield from ((grid, schedule) for schedule in (WARM, MILD) for grid in grids)
    shape = (problem.stages, problem.slots)
    nodes = seeds.usable_nodes(problem.hop_s, shape[0] * shape[1], problem.pin)
    for number in range(NUM_FOLDED + NUM_RANDOM):
        if number < NUM_FOLDED and can_fold(problem):
            yield folded(problem, min(moves, budget.left), random, budget), WARM
        else:
            yield seeds.obey(seeds.shuffled(nodes, *shape, random), problem.pin), HOT
