"""Simulated annealing on who is in which stage, compiled: every hop is paired best at all times.

Where the annealing over lanes has to find the lanes as well, this one looks only at stages, and
each move re-pairs the hops it touches exactly. At 64 nodes a move takes 0.2 us where nearly all
are refused (by what the hops take at least) and 1.4 us where a quarter is done.

A state is a permutation `at` of all nodes: position stage * V + seat holds a node of the stage,
positions from S * V on hold spare ones. See `pairing` for `partner` and `back`, `nearest` for
`low`, `lone` and `ways`.
"""

import numpy as np
from numpy.typing import NDArray

from swarmnode.coordinator.solver.chance import below, draw
from swarmnode.coordinator.solver.compiled import compiled, inlined
from swarmnode.coordinator.solver.grid.nearest import (
    change_lows,
    find_lone,
    find_low,
    floor_of_hop,
)
from swarmnode.coordinator.solver.grid.pairing import FREE, release, settle

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

COOLING_STEP = 64
"""Moves between two changes of temperature and blend."""
RESOLUTION = 2.0**-31
RANDOM_KINDS, HOME_KINDS = 2, 2
"""Of 8 moves: between any two nodes, and of a loose node to its home; the others are of a loose
node to anywhere."""
LOOSE_TRIES = 48
NEAR = 1e-12


@inlined
def _row_top(
    at: Ints, row_in: Floats, row_out: Floats, row_now: Floats, s: int, u: int, comes: int,
    rows: Floats,
) -> float:  # fmt: skip
    """The row sums of stage `s` if `comes` takes seat `u`: into `rows`; returns the greatest."""
    slots = row_now.shape[1]
    goes, own, top = at[s * slots + u], 0.0, 0.0
    for k in range(slots):
        if k != u:
            node = at[s * slots + k]
            rows[k] = row_now[s, k] - row_in[goes, node] + row_in[comes, node]
            top = max(top, rows[k])
            own += row_out[comes, node]
    rows[u] = own
    return max(top, own)


@compiled
def _refresh(
    at: Ints, row_out: Floats, hop: Floats, charge: Floats, row_now: Floats, row_max: Floats,
    hop_max: Floats, partner: Ints, back: Ints, reach: Floats, came: Ints, done: Ints,
) -> float:  # fmt: skip
    """Compute all that is kept about the grid from nothing; returns the charges."""
    stages, slots = row_now.shape
    charges = 0.0
    partner[:, :] = FREE
    back[:, :] = FREE
    for s in range(stages):
        row_max[s] = 0.0
        for u in range(slots):
            node = at[s * slots + u]
            row_now[s, u] = 0.0
            for k in range(slots):
                row_now[s, u] += row_out[node, at[s * slots + k]]
            row_max[s] = max(row_max[s], row_now[s, u])
            charges += charge[node, s]
        if s + 1 < stages:
            hop_max[s] = settle(at, hop, partner, back, s, 0.0, np.inf, reach, came, done)
    return charges


@compiled
def _propose(at: Ints, home: Ints, word: Words, stages: int, slots: int) -> tuple[int, int]:
    """A position in the grid and any other: mostly of a node that is loose, and often its home.

    Loose is who came anew, is spare, or is away from home already: it moves at no new charge.
    """
    num_nodes, kind = len(at), below(word, 8)
    p, q = below(word, stages * slots), below(word, num_nodes)
    if kind < RANDOM_KINDS:
        return p, q
    for _ in range(LOOSE_TRIES):
        if home[at[q]] == FREE or home[at[q]] != q // slots:
            break
        q = below(word, num_nodes)
    if kind < RANDOM_KINDS + HOME_KINDS and home[at[q]] != FREE:
        p = home[at[q]] * slots + below(word, slots)
    return p, q


@inlined
def _is_away(home: Ints, node: int, stage: int) -> int:
    """1 for a node that has a home and is in another stage, else 0."""
    return 1 if home[node] != FREE and home[node] != stage else 0


@inlined
def _touched(hops: Ints, stages: int, s: int, t: int) -> int:
    """The hops beside the stages s and t, each once, into `hops`; returns how many."""
    count = 0
    for h in range(stages - 1):
        if h in (s - 1, s, t - 1, t) and (t < stages or h in (s - 1, s)):
            hops[count] = h
            count += 1
    return count


@inlined
def _rise_of_rows(
    row_max: Floats, s: int, t: int, top_s: float, top_t: float, blend: float
) -> float:
    """By how much the dearest row rises, blended with the mean of the stages' dearest rows."""
    before, after, mean = 0.0, 0.0, 0.0
    for k in range(len(row_max)):
        new = top_s if k == s else (top_t if k == t else row_max[k])
        before, after = max(before, row_max[k]), max(after, new)
        mean += new - row_max[k]
    return (1.0 - blend) * (after - before) + blend * mean / len(row_max)


@inlined
def _find_floors(
    at: Ints, hop: Floats, low: Floats, lone: Ints, ways: Floats, slots: int,
    hops: Ints, count: int, p: int, q: int, floors: Floats,
) -> None:  # fmt: skip
    """What the hops listed in `hops` take at least once positions p and q are exchanged."""
    s, t = p // slots, q // slots
    u, v = p - s * slots, q - t * slots
    for k in range(count):
        h = hops[k]
        floors[k] = floor_of_hop(
            at, hop, low, lone, ways, slots, h,
            u if h == s else (v if h == t else FREE),
            u if h == s - 1 else (v if h == t - 1 else FREE),
            at[q] if h == s else at[p], at[q] if h == s - 1 else at[p],
        )  # fmt: skip


@inlined
def _exchange(
    at: Ints, row_in: Floats, row_out: Floats, hop: Floats,
    row_now: Floats, row_max: Floats, hop_max: Floats, partner: Ints, back: Ints,
    low: Floats, lone: Ints, ways: Floats,
    rows: Floats, floors: Floats, reach: Floats, hops: Ints, saved: Ints, count: int,
    p: int, q: int, rise: float, blend: float, allowance: float,
) -> bool:  # fmt: skip
    """Exchange the nodes at positions p (in the grid) and q (another stage, or spare).

    Done if the cost rises by at most `allowance`; `rise` is what it rises by if the `count` hops
    in `hops` take `floors` and the rows stay. Long because all of it is undone together.
    Scratch: rows (2, V), reach (V,), saved (10, V), the last 4 of floors (8,).
    """
    stages, slots = row_now.shape
    tops = floors[4:]
    a, b = at[p], at[q]
    s, t = p // slots, q // slots
    u, v = p - s * slots, q - t * slots
    top_s = _row_top(at, row_in, row_out, row_now, s, u, b, rows[0])
    top_t = 0.0
    if t < stages:
        top_t = _row_top(at, row_in, row_out, row_now, t, v, a, rows[1])
    rise += _rise_of_rows(row_max, s, t, top_s, top_t, blend)
    if rise > allowance:
        return False
    at[p], at[q] = b, a
    for k in range(count):
        h = hops[k]
        tops[k] = hop_max[h]
        saved[k, :], saved[4 + k, :] = partner[h], back[h]
    release(partner, back, s, u)
    if t < stages:
        release(partner, back, t, v)
    for k in range(count):
        h = hops[k]
        limit = (allowance - rise + floors[k]) * (1.0 + NEAR) + NEAR
        hop_max[h] = settle(at, hop, partner, back, h, floors[k], limit, reach, saved[8], saved[9])
        rise += hop_max[h] - floors[k]
        if rise > allowance:
            break
    if rise > allowance:
        at[p], at[q] = a, b
        for k in range(count):
            h = hops[k]
            hop_max[h] = tops[k]
            partner[h, :], back[h, :] = saved[k], saved[4 + k]
        return False
    row_now[s, :] = rows[0]
    row_max[s] = top_s
    change_lows(at, hop, low, slots, s, a, b)
    if t < stages:
        row_now[t, :] = rows[1]
        row_max[t] = top_t
        change_lows(at, hop, low, slots, t, b, a)
    for k in range(count):
        find_lone(at, low, lone, ways, slots, hops[k])
    return True


@compiled
def regroup(
    at: Ints, row_in: Floats, row_out: Floats, hop: Floats, charge: Floats, pin: Ints, home: Ints,
    row_now: Floats, row_max: Floats, hop_max: Floats, partner: Ints, back: Ints,
    best: Ints, schedule: Floats, word: Words, first: int, last: int, total: int,
) -> float:  # fmt: skip
    """Try the moves [first, last) of a run of `total`; returns the least cost seen, its nodes in
    `best`.

    Shapes: the tables (N, N), row_out[a, b] what b adds to a's row sum and row_in its transpose;
    charge (N, S); pin, home (N,), -1 for none: `home` is the stage that charges a node less than
    others, and who is elsewhere counts as away. row_now (S, V), row_max (S,), hop_max (S,),
    partner, back (S, V) are scratch.
    `schedule` is: greatest and least temperature, first blend, share of the run at which the
    blend is 0, the least cost so far, how many may be away in `best`, and what each one more
    costs on the way.
    """
    stages, slots = row_now.shape
    reach, rows, floors = np.empty(slots), np.empty((2, slots)), np.empty(8)
    hops, saved = np.empty(4, np.int64), np.empty((10, slots), np.int64)
    low, lone = np.empty((len(at), stages)), np.empty((stages, 2), np.int64)
    ways = np.empty((stages, 2, 2))
    for n in range(len(at)):
        for k in range(stages):
            find_low(at, hop, low, slots, n, k)
    for h in range(stages - 1):
        find_lone(at, low, lone, ways, slots, h)
    charges = _refresh(
        at, row_out, hop, charge, row_now, row_max, hop_max, partner, back,
        reach, saved[8], saved[9],
    )  # fmt: skip
    temperature, blend, least = schedule[0], schedule[2], float(schedule[4])
    most, dearer_s, away = schedule[5], schedule[6], 0
    for p in range(stages * slots):
        away += _is_away(home, at[p], p // slots)
    for move in range(first, last):
        if (move - first) % COOLING_STEP == 0:
            share = move / total
            temperature = schedule[0] * (schedule[1] / schedule[0]) ** share
            blend = schedule[2] * max(0.0, 1.0 - share / schedule[3])
        allowance = -temperature * np.log((draw(word) + 1) * RESOLUTION)
        p, q = _propose(at, home, word, stages, slots)
        s, t, a, b = p // slots, q // slots, at[p], at[q]
        if s == t or (pin[a] >= 0 and pin[a] != t) or (pin[b] >= 0 and pin[b] != s):
            continue
        more = charge[b, s] - charge[a, s]
        if t < stages:
            more += charge[a, t] - charge[b, t]
        now = away + _is_away(home, b, s) - _is_away(home, a, s)
        if t < stages:
            now += _is_away(home, a, t) - _is_away(home, b, t)
        excess_s = dearer_s * (max(0.0, now - most) - max(0.0, away - most))
        count, rise = _touched(hops, stages, s, t), more + excess_s
        _find_floors(at, hop, low, lone, ways, slots, hops, count, p, q, floors)
        for k in range(count):
            rise += floors[k] - hop_max[hops[k]]
        if rise + _rise_of_rows(row_max, s, t, 0.0, 0.0, blend) > allowance:
            continue
        if _exchange(
            at, row_in, row_out, hop, row_now, row_max, hop_max, partner, back, low, lone, ways,
            rows, floors, reach, hops, saved, count, p, q, rise, blend, allowance,
        ):  # fmt: skip
            charges += more
            away = now
            cost = row_max.max() + hop_max.sum() + charges
            if away <= most and cost < least * (1.0 - NEAR):
                least = cost
                best[:] = at
    schedule[4] = least
    return least
