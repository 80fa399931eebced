"""Simulated annealing over hosts and layers for the `training` cost, compiled with numba.

A state is the grid (S, V) of hosts, where a machine may appear again, and the number of layers of
each stage. Each candidate is priced in full by the compiled formula, about 4 us for 64 slots; one
that overfills a machine, breaks a pin or needs a missing link is never accepted. The search
follows (1 - blend) * cost + blend * (the same with means instead of maxima), with `blend` and the
temperature falling: the means lead through the plateaus of the maxima.

numba keeps machine code by the date of this file alone: whoever changes `step_formula` must touch
this file too, or clear the cache (a test compares the compiled price with the plain one).
"""

import numpy as np

from swarmnode.coordinator.cost import step_formula as on
from swarmnode.coordinator.cost.step_formula import Floats, Ints, Tables
from swarmnode.coordinator.solver.chance import Words, below, draw
from swarmnode.coordinator.solver.compiled import compiled

fill_stages = compiled(on.fill_stages)
fill_machines = compiled(on.fill_machines)
fill_columns = compiled(on.fill_columns)
add_reduction = compiled(on.add_reduction)
sum_up = compiled(on.sum_up)

OUT_S, IN_S, OWN_WEIGHTS = on.OUT_S, on.IN_S, on.OWN_WEIGHTS
TOTAL_S, SMOOTH_S = on.TOTAL_S, on.SMOOTH_S
COST, SMOOTH, BEST = range(3)
"""Places in `now`: of the current state its cost and smooth cost, and the best cost so far."""


class Scratch:
    """Arrays that the kernel writes into, for one shape of problem."""

    def __init__(self, num_nodes: int, stages: int, slots: int) -> None:
        self.stage = np.zeros((on.NUM_STAGE_ROWS, stages))
        self.machine = np.zeros((on.NUM_MACHINE_ROWS, num_nodes))
        self.column = np.zeros((on.NUM_COLUMN_ROWS, slots))
        self.step = np.zeros(on.NUM_STEP_PLACES)
        self.latency_s = np.zeros(stages)

    @property
    def arrays(self) -> tuple[Floats, Floats, Floats, Floats, Floats]:
        return self.stage, self.machine, self.column, self.step, self.latency_s


@compiled
def charge_of(
    grid: Ints, counts: Ints, old_starts: Ints, charge_s: Floats, machine: Floats
) -> float:
    """What moving to this state costs.

    `charge_s` (2, N, S): for a stage that keeps its layers, for one that changes them.
    `old_starts` (S + 1,) are the boundaries that run now.
    """
    total, start = 0.0, 0
    num_stages, num_slots = grid.shape
    for s in range(num_stages):
        stop = start + counts[s]
        changed = np.int64(old_starts[s] != start or old_starts[s + 1] != stop)
        start = stop
        for v in range(num_slots):
            node = grid[s, v]
            if machine[on.STAMP, node] != -1.0 - s:
                machine[on.STAMP, node] = -1.0 - s
                total += charge_s[changed, node, s]
    return total


@compiled
def evaluate(
    grid: Ints, counts: Ints, tables: Tables, old_starts: Ints, charge_s: Floats,
    scratch: tuple[Floats, Floats, Floats, Floats, Floats],
) -> bool:  # fmt: skip
    """Price a state, charges included, into the step's total and smooth; False if it cannot be."""
    stage, machine, column, step, latency_s = scratch
    num_stages, num_slots = grid.shape
    fill_stages(counts, tables, stage)
    if not fill_machines(grid, tables, stage, machine):
        return False
    for s in range(num_stages):
        for v in range(num_slots):
            if not machine[OUT_S, grid[s, v]] + machine[IN_S, grid[s, v]] < np.inf:
                return False
    fill_columns(grid, tables, stage, machine, column)
    for s in range(num_stages):
        latency_s[s] = add_reduction(grid[s], stage[OWN_WEIGHTS, s], tables, machine)
    if tables.tied_weights > 0.0 and num_stages > 1:
        ends = np.empty(2 * num_slots, dtype=np.int64)
        for v in range(num_slots):
            ends[v], ends[num_slots + v] = grid[0, v], grid[num_stages - 1, v]
        both = add_reduction(ends, tables.tied_weights, tables, machine)
        latency_s[0] = max(latency_s[0], both)
        latency_s[num_stages - 1] = max(latency_s[num_stages - 1], both)
    sum_up(grid, tables, stage, machine, column, latency_s, step)
    charge = charge_of(grid, counts, old_starts, charge_s, machine)
    step[TOTAL_S] += charge
    step[SMOOTH_S] += charge
    return bool(step[TOTAL_S] < np.inf)


@compiled
def change(grid: Ints, counts: Ints, num_nodes: int, word: Words) -> None:
    """One random move. Its kinds: two slots swap hosts; a slot gets another host, any machine or
    one from its own row or column; two pipelines swap tails; a layer goes to another stage, the
    boundaries between shift; two machines, or two stages, change places altogether."""
    num_stages, num_slots = grid.shape
    s, v = below(word, num_stages), below(word, num_slots)
    other_s, other_v = below(word, num_stages), below(word, num_slots)
    kind = below(word, 16)
    if kind < 4:
        grid[s, v], grid[other_s, other_v] = grid[other_s, other_v], grid[s, v]
    elif kind < 7:
        grid[s, v] = below(word, num_nodes)
    elif kind == 7:
        grid[s, v] = grid[s, other_v]
    elif kind == 8:
        grid[s, v] = grid[other_s, v]
    elif kind == 9:
        for k in range(s, num_stages):
            grid[k, v], grid[k, other_v] = grid[k, other_v], grid[k, v]
    elif kind < 13:
        if kind == 12:
            other_s = max(0, min(num_stages - 1, s + 2 * below(word, 2) - 1))
        if counts[s] > 1 and s != other_s:
            counts[s] -= 1
            counts[other_s] += 1
    elif kind < 15:
        a, b = grid[s, v], below(word, num_nodes)
        for i in range(num_stages):
            for j in range(num_slots):
                if grid[i, j] == a:
                    grid[i, j] = b
                elif grid[i, j] == b:
                    grid[i, j] = a
    else:
        counts[s], counts[other_s] = counts[other_s], counts[s]
        for j in range(num_slots):
            grid[s, j], grid[other_s, j] = grid[other_s, j], grid[s, j]


@compiled
def copy_state(grid: Ints, counts: Ints, to_grid: Ints, to_counts: Ints) -> None:
    """Copy a state; loops, since slices take seconds to compile."""
    for s in range(grid.shape[0]):
        to_counts[s] = counts[s]
        for v in range(grid.shape[1]):
            to_grid[s, v] = grid[s, v]


@compiled
def anneal(
    grid: Ints, counts: Ints, best_grid: Ints, best_counts: Ints, now: Floats, word: Words,
    tables: Tables, old_starts: Ints, charge_s: Floats,
    scratch: tuple[Floats, Floats, Floats, Floats, Floats],
    first_move: int, last_move: int, num_moves: int, heat: float, blend: float,
) -> None:  # fmt: skip
    """Moves [first_move, last_move) of `num_moves`; state, best and random word are kept.

    `heat` is the first temperature as a share of the cost; it falls to 1e-4 of itself, `blend`
    to nothing after 80 % of the moves. `now` (3,) must hold the state's own prices.
    """
    num_nodes = tables.flop_s.shape[0]
    trial, trial_counts = grid.copy(), counts.copy()
    step = scratch[3]
    for move in range(first_move, last_move):
        share = move / num_moves
        mix = blend * max(0.0, 1.0 - share / 0.8)
        scale = heat * 1e-4**share * now[BEST]
        copy_state(grid, counts, trial, trial_counts)
        change(trial, trial_counts, num_nodes, word)
        chance = (draw(word) + 1) / 2147483648.0
        if not evaluate(trial, trial_counts, tables, old_starts, charge_s, scratch):
            continue
        old = (1.0 - mix) * now[COST] + mix * now[SMOOTH]
        new = (1.0 - mix) * step[TOTAL_S] + mix * step[SMOOTH_S]
        if new > old - scale * np.log(chance):
            continue
        copy_state(trial, trial_counts, grid, counts)
        now[COST], now[SMOOTH] = step[TOTAL_S], step[SMOOTH_S]
        if now[COST] < now[BEST]:
            now[BEST] = now[COST]
            copy_state(trial, trial_counts, best_grid, best_counts)


@compiled
def try_all(
    first: Ints, best_grid: Ints, best_counts: Ints, tables: Tables, old_starts: Ints,
    charge_s: Floats, scratch: tuple[Floats, Floats, Floats, Floats, Floats],
) -> float:  # fmt: skip
    """Price every arrangement there is; the least cost, infinite if none fits.

    `first` (S,) has one layer in each stage and the rest in the last; all splits of as many
    layers are tried, with all hosts.
    """
    stages, slots = best_grid.shape
    num_nodes = tables.flop_s.shape[0]
    grid, counts = np.zeros_like(best_grid), np.ones_like(best_counts)
    for s in range(stages):
        counts[s] = first[s]
    best = np.inf
    while True:
        for s in range(stages):
            for v in range(slots):
                grid[s, v] = 0
        while True:
            ok = evaluate(grid, counts, tables, old_starts, charge_s, scratch)
            if ok and scratch[3][TOTAL_S] < best:
                best = scratch[3][TOTAL_S]
                copy_state(grid, counts, best_grid, best_counts)
            place = 0
            while place < stages * slots:
                s, v = place // slots, place % slots
                grid[s, v] += 1
                if grid[s, v] < num_nodes:
                    break
                grid[s, v] = 0
                place += 1
            if place == stages * slots:
                break
        k, tail = stages - 2, counts[stages - 1]  # the next split: one more in front of a tail
        while k >= 0 and tail <= stages - 1 - k:
            tail += counts[k]
            k -= 1
        if k < 0:
            return best
        rest = tail + counts[k]
        counts[k] += 1
        for j in range(k + 1, stages):
            counts[j] = 1
        counts[stages - 1] = rest - counts[k] - (stages - 2 - k)


@compiled
def descend(
    grid: Ints, counts: Ints, tables: Tables, old_starts: Ints, charge_s: Floats,
    scratch: tuple[Floats, Floats, Floats, Floats, Floats],
) -> float:  # fmt: skip
    """Take every single change that helps, until none does or
    some seconds are over: two slots swap hosts, a slot gets
    another host (where that is not too many), a layer goes to another stage. The cost then."""
    step = scratch[3]
    num_stages, num_slots = grid.shape
    num_nodes, size = tables.flop_s.shape[0], num_stages * num_slots
    tries = max(2_000, 4_000_000 // size)
    evaluate(grid, counts, tables, old_starts, charge_s, scratch)
    best, again = float(step[TOTAL_S]), True
    while again:
        again = False
        for i in range(size):
            tries -= i + (num_nodes if size * num_nodes <= 20_000 else 0)
            if tries < 0:
                break
            s, v = i // num_slots, i % num_slots
            for j in range(i):
                k, w = j // num_slots, j % num_slots
                if grid[s, v] == grid[k, w]:
                    continue
                grid[s, v], grid[k, w] = grid[k, w], grid[s, v]
                ok = evaluate(grid, counts, tables, old_starts, charge_s, scratch)
                if ok and step[TOTAL_S] < best * (1.0 - 1e-9):
                    best, again = step[TOTAL_S], True
                else:
                    grid[s, v], grid[k, w] = grid[k, w], grid[s, v]
            for node in range(num_nodes if size * num_nodes <= 20_000 else 0):
                old = grid[s, v]
                grid[s, v] = node
                ok = evaluate(grid, counts, tables, old_starts, charge_s, scratch)
                if ok and step[TOTAL_S] < best * (1.0 - 1e-9):
                    best, again = step[TOTAL_S], True
                else:
                    grid[s, v] = old
        for s in range(num_stages):
            for k in range(num_stages):
                if s == k or counts[s] < 2:
                    continue
                counts[s] -= 1
                counts[k] += 1
                ok = evaluate(grid, counts, tables, old_starts, charge_s, scratch)
                if ok and step[TOTAL_S] < best * (1.0 - 1e-9):
                    best, again = step[TOTAL_S], True
                else:
                    counts[s] += 1
                    counts[k] -= 1
        again = again and tries > 0
    return float(best)


@compiled
def overflow(grid: Ints, counts: Ints, tables: Tables, stage: Floats, machine: Floats) -> float:
    """How far a state is from fitting, in bytes; a broken pin or link weighs a whole model."""
    num_stages, num_slots = grid.shape
    fill_stages(counts, tables, stage)
    worst, total = 0.0, 0.0
    for s in range(num_stages):
        worst += stage[on.SLOT_BYTES, s] + stage[on.STATE_BYTES, s]
        for v in range(num_slots):
            machine[on.USED, grid[s, v]] = 0.0
            machine[on.STAMP, grid[s, v]] = 0.0
    for s in range(num_stages):
        for v in range(num_slots):
            node = grid[s, v]
            total += 0.0 if tables.is_allowed[node, s] else worst
            machine[on.USED, node] += stage[on.SLOT_BYTES, s]
            if machine[on.STAMP, node] != s + 1.0:
                machine[on.STAMP, node] = s + 1.0
                machine[on.USED, node] += stage[on.STATE_BYTES, s]
            for w in range(num_slots):
                if not tables.reduce_out_s[node, grid[s, w]] < np.inf:
                    total += worst
            if s + 1 < num_stages:
                after = grid[s + 1, v]
                if (
                    not tables.forward_out_s[node, after] + tables.backward_out_s[after, node]
                    < np.inf
                ):
                    total += worst
    if tables.tied_weights > 0.0:
        for v in range(num_slots):
            for w in range(num_slots):
                a, b = grid[0, v], grid[num_stages - 1, w]
                if not tables.reduce_out_s[a, b] + tables.reduce_out_s[b, a] < np.inf:
                    total += worst
    for s in range(num_stages):
        for v in range(num_slots):
            node = grid[s, v]
            total += max(0.0, machine[on.USED, node] - tables.room_bytes[node])
            machine[on.USED, node] = 0.0
    return total


@compiled
def repair(
    grid: Ints, counts: Ints, word: Words, tables: Tables,
    scratch: tuple[Floats, Floats, Floats, Floats, Floats], num_moves: int,
) -> float:  # fmt: skip
    """Change the state until it fits, at most `num_moves` times; what is left of the overflow."""
    stage, machine = scratch[0], scratch[1]
    num_nodes = tables.flop_s.shape[0]
    left = overflow(grid, counts, tables, stage, machine)
    heat = left / (grid.size + 1)
    trial, trial_counts = grid.copy(), counts.copy()
    for move in range(num_moves):
        if left == 0.0:
            break
        copy_state(grid, counts, trial, trial_counts)
        change(trial, trial_counts, num_nodes, word)
        new = overflow(trial, trial_counts, tables, stage, machine)
        chance = (draw(word) + 1) / 2147483648.0
        if new <= left - heat * 1e-3 ** (move / num_moves) * np.log(chance):
            left = new
            copy_state(trial, trial_counts, grid, counts)
    return left
