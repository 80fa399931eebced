"""Compiled: annealing over the ranges of layers that nodes hold, and the exact walk when small."""

import numpy as np
from numpy.typing import NDArray

from swarmnode.coordinator.solver.compiled import compiled
from swarmnode.coordinator.solver.serving.kernels import (
    FAR,
    Cost,
    Ints,
    Room,
    Tables,
    cost_of,
)

Flags = NDArray[np.bool_]
State = NDArray[np.uint64]
NUM_MOVES = 10
"""Kinds of moves; some are drawn more often, see `propose`."""


@compiled
def draw(state: State, below: int) -> int:
    """A number in 0 .. below - 1. Source: xorshift64*, Marsaglia 2003 and Vigna 2016."""
    x = state[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state[0] = x
    scrambled = (x * np.uint64(2685821657736338717)) >> np.uint64(33)
    return np.int64(scrambled) % below  # type: ignore[return-value]  # compiled to an int


@compiled
def anneal(
    start: Ints,
    stop: Ints,
    best_start: Ints,
    best_stop: Ints,
    best_s: float,
    fixed: Flags,
    tables: Tables,
    room: Room,
    state: State,
    done: int,
    num_moves: int,
    of_moves: int,
    blur: float,
    heat: float,
) -> float:
    """Try moves `done` .. `done + num_moves` of a run of `of_moves`; returns the best total_s.

    Changes start, stop (where the walk is) and best_start, best_stop in place. heat is the
    relative cost of a move that is taken with probability 1/e at first; it falls 300 times,
    blur falls to nothing. Length: one loop, its state in locals so that it stays fast.
    """
    count = len(start)
    new_start, new_stop = start.copy(), stop.copy()
    now_s = FAR
    last_blur = -1.0
    for move in range(done, done + num_moves):
        share = move / of_moves
        if (move - done) % 512 == 0:
            last_blur = blur * (1.0 - share) ** 2 if share < 0.9 else 0.0
            now = cost_of(start, stop, tables, room, last_blur, 0.25, FAR)
            now_s = now.smooth
            if now.total_s < best_s:
                best_s = now.total_s
                best_start[:], best_stop[:] = start, stop
        new_start[:], new_stop[:] = start, stop
        if not propose(new_start, new_stop, fixed, tables, state):
            continue
        is_pinned_well = True
        for i in range(count):
            if fixed[i] and (new_start[i] != start[i] or new_stop[i] != stop[i]):
                is_pinned_well = False
        if not is_pinned_well:
            continue
        chance = (draw(state, 1 << 30) + 1) / (1 << 30)
        above = min(FAR, now_s * chance ** (-heat * 300.0 ** (-share)))
        new = cost_of(new_start, new_stop, tables, room, last_blur, 0.25, above)
        if new.smooth <= above:
            now_s = new.smooth
            for i in range(count):
                start[i], stop[i] = new_start[i], new_stop[i]
            if new.total_s < best_s:
                best_s = new.total_s
                best_start[:], best_stop[:] = start, stop
    return best_s


@compiled
def propose(start: Ints, stop: Ints, fixed: Flags, tables: Tables, state: State) -> bool:
    """Change the ranges by one random move; whether the result is worth pricing.

    Length: the list of moves, one line or two for each.
    """
    count, num_layers = len(start), tables.num_layers
    i, j = draw(state, count), draw(state, count)
    kind = draw(state, NUM_MOVES)
    if fixed[i] or tables.most[i] == 0:
        return False
    is_idle = stop[i] == start[i]
    if kind <= 2:
        if not _ripple(start, stop, i, j, num_layers, state):
            return False
    elif kind == 3:
        start[i], start[j] = start[j], start[i]
        stop[i], stop[j] = stop[j], stop[i]
    elif kind == 4:
        start[i], stop[i] = start[j], stop[j]
    elif kind == 5:
        _resize(start, stop, i, j, num_layers, state)
    elif kind == 6:
        k = 1 + draw(state, tables.most[i])
        start[i] = stop[j] if stop[j] < num_layers and stop[j] > start[j] else start[j]
        if draw(state, 2) == 0:
            start[i] = max(0, stop[j] - k)
        stop[i] = min(num_layers, start[i] + k)
    elif kind == 7:
        if not _insert(start, stop, i, j, state):
            return False
    elif kind == 8:
        if is_idle or not _trade_places(start, stop, i, j):
            return False
    elif draw(state, 4) > 0:
        _close(start, stop, i, state)
        if not _insert(start, stop, i, j, state):
            return False
    else:
        start[i], stop[i] = 0, 0
    return True


@compiled
def _ripple(start: Ints, stop: Ints, i: int, j: int, num_layers: int, state: State) -> bool:
    """Shift every boundary between the ends of i and j by a layer or two: one grows, one shrinks.

    Nodes that share a boundary keep sharing it; with i == j one boundary moves.
    """
    low, high = stop[i], stop[j]
    if draw(state, 2) == 0:
        low = start[i]
    if draw(state, 2) == 0:
        high = start[j]
    if low > high:
        low, high = high, low
    if low == 0 or high == num_layers or high == 0:
        return False
    step = 1 + draw(state, 2) if draw(state, 4) == 0 else 1
    if draw(state, 2) == 0:
        step = -step
    for n in range(len(start)):
        if stop[n] > start[n]:
            if low <= start[n] <= high:
                start[n] += step
            if low <= stop[n] <= high:
                stop[n] += step
            if start[n] >= stop[n] or start[n] < 0 or stop[n] > num_layers:
                return False
    return True


@compiled
def _resize(start: Ints, stop: Ints, i: int, j: int, num_layers: int, state: State) -> None:
    """Move one end of i: by a layer, or to an end of j."""
    ways = draw(state, 4)
    step = 1 if draw(state, 2) == 0 else -1
    if ways == 0:
        start[i] = min(max(0, start[i] + step), stop[i])
    elif ways == 1:
        stop[i] = min(num_layers, stop[i] + step)
    elif ways == 2:
        start[i] = start[j] if draw(state, 2) == 0 else stop[j]
    else:
        stop[i] = start[j] if draw(state, 2) == 0 else stop[j]
    if stop[i] < start[i]:
        stop[i] = start[i]


@compiled
def _insert(start: Ints, stop: Ints, i: int, j: int, state: State) -> bool:
    """Split the range of j: a part of it goes to i; twins of j stay as they are or split too."""
    left, right = start[j], stop[j]
    if i == j or right - left < 2:
        return False
    cut = left + 1 + draw(state, right - left - 1)
    if draw(state, 2) == 0:
        start[i], stop[i], stop[j] = cut, right, cut
    else:
        start[i], stop[i], start[j] = left, cut, cut
    return True


@compiled
def _close(start: Ints, stop: Ints, i: int, state: State) -> None:
    """Take i out of its chain: those before it grow over its range, or those behind it."""
    left, right = start[i], stop[i]
    is_forward = draw(state, 2) == 0
    for n in range(len(start)):
        if n != i and stop[n] > start[n]:
            if is_forward and stop[n] == left:
                stop[n] = right
            elif not is_forward and start[n] == right:
                start[n] = left
    start[i], stop[i] = 0, 0


@compiled
def _trade_places(start: Ints, stop: Ints, i: int, j: int) -> bool:
    """i and j change places and each keeps its number of layers; what lies between shifts."""
    if start[i] > start[j]:
        i, j = j, i
    if stop[j] == start[j] or stop[i] > start[j]:
        return False
    more = (stop[j] - start[j]) - (stop[i] - start[i])
    left, right = stop[i], start[j]
    first, last = start[i], stop[j]
    for n in range(len(start)):
        if n not in (i, j) and stop[n] > start[n]:
            if left <= start[n] <= right:
                start[n] += more
            if left <= stop[n] <= right:
                stop[n] += more
            if start[n] >= stop[n] or start[n] < 0:
                return False
    start[i], stop[i], start[j], stop[j] = right + more, last, first, left + more
    return True


@compiled
def try_all(
    options: Ints,
    num_options: Ints,
    turn: Ints,
    best: Ints,
    best_s: float,
    num_tries: int,
    tables: Tables,
    room: Room,
) -> float:
    """Price the next `num_tries` of all combinations of ranges; returns the best total_s.

    Shapes: options (N, most, 2), num_options (N,), turn (N,) counts like an odometer, best (N, 2).
    """
    count = len(turn)
    start, stop = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for _ in range(num_tries):
        for i in range(count):
            start[i], stop[i] = options[i, turn[i], 0], options[i, turn[i], 1]
        cost: Cost = cost_of(start, stop, tables, room, 0.0, 1.0, FAR)
        if cost.total_s < best_s:
            best_s = cost.total_s
            best[:, 0], best[:, 1] = start, stop
        for i in range(count):
            turn[i] += 1
            if turn[i] < num_options[i]:
                break
            turn[i] = 0
    return best_s
