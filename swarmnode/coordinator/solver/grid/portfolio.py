"""Which annealing runs to make with how many moves: cold ones, folded ones, and reheated ones.

Pure and anytime: the plan of runs depends only on the seed and the number of moves, and whoever
stops it early gets the best grid so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from swarmnode.coordinator.objective import Effort
from swarmnode.coordinator.solver.grid import annealing, multilevel, seeds
from swarmnode.coordinator.solver.grid.problem import GridProblem

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CHUNK_MOVES = 100_000
"""Moves between two looks at `should_stop`: 20 ms at 64 nodes, 0.1 s at 1000."""
LONGEST_RUN = 1_000_000
"""Moves of one run at 64 nodes, more for more nodes: two short runs beat one long one."""
SWAP_SHARE = 0.6
COOLED = 0.8
"""Share of a run after which only the maxima count."""


@dataclass(frozen=True)
class Schedule:
    """Temperatures are shares of the mean cost of random grids, times 64 / number of nodes."""

    hottest: float
    coldest: float
    blend: float


COLD = (Schedule(4e-3, 8e-5, 0.9), Schedule(4e-3, 8e-5, 0.5), Schedule(4e-3, 4e-5, 0.98))
FOLDED = Schedule(8e-3, 2e-4, 0.9)
UNFOLDED = Schedule(1.5e-3, 8e-5, 0.5)
WARM = (Schedule(1e-3, 8e-5, 0.5), Schedule(1.5e-3, 8e-5, 0.3), Schedule(5e-4, 4e-5, 0.3))
NUM_EXPLORERS = 6
"""Runs from new places before any reheats what they found."""


@dataclass
class Budget:
    """The moves of an effort, spent run by run."""

    effort: Effort
    spent: int = 0
    best_s: float = np.inf
    is_stopped: bool = False

    @property
    def left(self) -> int:
        return 0 if self.is_stopped else max(0, self.effort.moves - self.spent)

    def spend(self, moves: int, cost_s: float) -> None:
        """Count moves, tell how it goes, and ask whether to go on."""
        self.spent += moves
        self.best_s = min(self.best_s, cost_s)
        self.effort.report(min(1.0, self.spent / max(1, self.effort.moves)), self.best_s)
        self.is_stopped = self.is_stopped or self.effort.should_stop()


@dataclass
class Elites:
    """The few best grids, all of different cost: equal cost is nearly always the same grid."""

    most: int = 3
    grids: list[tuple[float, Ints]] = field(default_factory=list)

    def offer(self, problem: GridProblem, grid: Ints) -> None:
        cost_s = problem.cost(grid)
        if all(abs(cost_s - known_s) > 1e-9 * known_s for known_s, _ in self.grids):
            self.grids = sorted([*self.grids, (cost_s, grid)], key=lambda at: at[0])[: self.most]


def anneal_from(
    problem: GridProblem, grid: Ints, schedule: Schedule, moves: int, seed: int, budget: Budget
) -> Ints:
    """One run from `grid`: the best grid seen, polished; never worse than `grid`.

    Shapes: (S, V) -> (S, V). It stops between chunks when the budget says so.
    """
    stages, slots = grid.shape
    spare = np.setdiff1d(np.arange(problem.num_nodes), grid)
    at = np.concatenate([grid.ravel(), spare]).astype(np.int64)
    best = at.copy()
    unit_s = problem.scale_s * 64.0 / max(1, stages * slots)
    kept = (
        np.zeros((stages, slots)), np.zeros((stages, slots)),
        np.zeros(stages), np.zeros(stages), np.zeros(5),
    )  # fmt: skip
    knobs = np.array([
        max(schedule.hottest * unit_s, 1e-12), max(schedule.coldest * unit_s, 1e-12),
        schedule.blend, COOLED, SWAP_SHARE if slots > 1 else 1.0, problem.cost(grid),
    ])  # fmt: skip
    word = np.array([seed * 2 + 1], dtype=np.uint64)
    row_in = np.ascontiguousarray(problem.reduce_s.T)
    done = 0
    while done < moves and not budget.is_stopped:
        stop = min(moves, done + CHUNK_MOVES)
        least_s = annealing.anneal(
            at, row_in, problem.reduce_s, problem.hop_s, problem.charge_s, problem.pin, *kept,
            best, knobs, word, done, stop, moves,
        )  # fmt: skip
        budget.spend(stop - done, least_s)
        done = stop
    return problem.polished(best[: stages * slots].reshape(stages, slots))


def search_grids(problem: GridProblem, starts: Sequence[Ints], budget: Budget) -> Ints:
    """The best grid that the budget finds, at least as good as the best of `starts`.

    Nothing has to stay where it is, so runs may begin anywhere. Runs that explore alternate with
    runs that reheat one of the elites.
    """
    elites = Elites()
    for grid in starts:
        elites.offer(problem, problem.polished(grid))
    moves = max(1, min(budget.left // 8, LONGEST_RUN * max(64, problem.num_nodes) // 64))
    count = 0
    while budget.left > 0:
        random = np.random.default_rng([budget.effort.seed, count])
        run = min(moves, budget.left)
        if count < NUM_EXPLORERS or count % 2:
            found = _explore(problem, count, run, random, budget)
        else:
            _, grid = elites.grids[(count // 2) % len(elites.grids)]
            schedule = WARM[count // 2 % len(WARM)]
            found = anneal_from(problem, grid, schedule, run, word_of(random), budget)
        elites.offer(problem, found)
        count += 1
    return elites.grids[0][1]


def _explore(
    problem: GridProblem, count: int, moves: int, random: np.random.Generator, budget: Budget
) -> Ints:
    """A run from a new place: folded or cold."""
    if count % 2 == 0 or not can_fold(problem):
        nodes = seeds.usable_nodes(problem.hop_s, problem.stages * problem.slots, problem.pin)
        grid = seeds.obey(seeds.shuffled(nodes, problem.stages, problem.slots, random), problem.pin)
        schedule = COLD[count // 2 % len(COLD)]
        return anneal_from(problem, grid, schedule, moves, word_of(random), budget)
    return folded(problem, moves, random, budget)


def can_fold(problem: GridProblem) -> bool:
    """Whether blocks of nodes are a simpler instance than the nodes."""
    return problem.slots > 2 and problem.num_nodes >= 32


def folded(problem: GridProblem, moves: int, random: np.random.Generator, budget: Budget) -> Ints:
    """Arrange blocks of near nodes, unfold them, and go on with single nodes."""
    stages, slots = problem.stages, problem.slots
    nodes = seeds.usable_nodes(problem.hop_s, stages * slots, problem.pin)
    size = multilevel.block_size(slots, len(nodes), 24)
    coarse = multilevel.coarsen(nodes, problem.reduce_s, problem.hop_s, size)
    num_blocks = len(coarse.members)
    folded = GridProblem(
        coarse.reduce_s, coarse.hop_s,
        np.zeros((num_blocks, stages)), np.full(num_blocks, -1, dtype=np.int64),
        slots // size, problem.scale_s,
    )  # fmt: skip
    grid = seeds.shuffled(np.arange(num_blocks), stages, slots // size, random)
    quiet = Budget(replace(budget.effort, report=lambda _done, _best: None))  # costs are not ours
    blocks = anneal_from(folded, grid, FOLDED, moves // 4, word_of(random), quiet)
    budget.spend(quiet.spent, budget.best_s)
    unfolded = seeds.obey(coarse.unfold(blocks), problem.pin)
    return anneal_from(problem, unfolded, UNFOLDED, moves - moves // 4, word_of(random), budget)


def word_of(random: np.random.Generator) -> int:
    """A start for the kernel's own generator."""
    return int(random.integers(1, 2**62))
