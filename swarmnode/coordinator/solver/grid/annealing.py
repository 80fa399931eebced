"""Simulated annealing on a grid of stages and slots, compiled: about 0.2 us a move at 64 nodes.

A state is a permutation `at` of all nodes: position stage * V + slot holds a node of the grid,
positions from S * V on hold the spare ones. The cost is

    max over nodes of its row sum in its stage  +  sum over hops of the slowest pair  +  charges

and the search follows (1 - blend) * that + blend * the same with means instead of maxima, with
`blend` and the temperature falling to (almost) nothing. The means lead through the plateaus of
the maxima. Every move costs O(V).
"""

import numpy as np
from numpy.typing import NDArray

from swarmnode.coordinator.solver.chance import Words, below, draw
from swarmnode.coordinator.solver.compiled import compiled

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ROWS, HOPS, CHARGES, WORST_ROW, HOP_MAXIMA = range(5)
"""Places in `sums`: of all row sums, of all hop pairs, of charges, the greatest row sum, and the
sum of the hops' maxima."""


@compiled
def refresh(
    at: Ints, row_out: Floats, hop: Floats, charge: Floats,
    row_now: Floats, hop_now: Floats, row_max: Floats, hop_max: Floats, sums: Floats,
) -> None:  # fmt: skip
    """Compute all that is kept about the grid from nothing, so that no error adds up.

    Shapes: at (N,); row_out[a, b] what b adds to a's row sum, hop (N, N); charge (N, S); row_now,
    hop_now (S, V); row_max, hop_max (S,); sums (5,).
    """
    stages, slots = row_now.shape
    sums[:] = 0.0
    for s in range(stages):
        row_max[s], hop_max[s] = 0.0, 0.0
        for v in range(slots):
            node = at[s * slots + v]
            total = 0.0
            for k in range(slots):
                total += row_out[node, at[s * slots + k]]
            row_now[s, v] = total
            row_max[s] = max(row_max[s], total)
            sums[ROWS] += total
            sums[CHARGES] += charge[node, s]
            if s + 1 < stages:
                hop_now[s, v] = hop[node, at[(s + 1) * slots + v]]
                hop_max[s] = max(hop_max[s], hop_now[s, v])
                sums[HOPS] += hop_now[s, v]
        sums[WORST_ROW] = max(sums[WORST_ROW], row_max[s])
        sums[HOP_MAXIMA] += hop_max[s]


@compiled
def _change_hop(hop_now: Floats, hop_max: Floats, s: int, v: int, value: float) -> None:
    """Give pair `v` of hop `s` another time; its maximum is looked for only where it must be."""
    old, top = hop_now[s, v], hop_max[s]
    hop_now[s, v] = value
    if value >= top:
        hop_max[s] = value
    elif old >= top:
        top = 0.0
        for k in range(hop_now.shape[1]):
            top = max(top, hop_now[s, k])
        hop_max[s] = top


@compiled
def _rows_without(
    at: Ints, row_in: Floats, row_out: Floats, row_now: Floats,
    s: int, v: int, comes: int, rows: Floats,
) -> tuple[float, float]:  # fmt: skip
    """Row sums of stage `s` if `comes` takes slot `v`: into `rows`; returns maximum and sum."""
    slots = row_now.shape[1]
    first = s * slots
    goes = at[first + v]
    own, top, total = 0.0, 0.0, 0.0
    for k in range(slots):
        node = at[first + k]
        if k != v:
            value = row_now[s, k] - row_in[goes, node] + row_in[comes, node]
            own += row_out[comes, node]
            rows[k] = value
            top = max(top, value)
            total += value
    rows[v] = own
    return max(top, own), total + own


@compiled
def _swap(
    at: Ints, row_in: Floats, row_out: Floats, hop: Floats, charge: Floats, pin: Ints,
    row_now: Floats, hop_now: Floats, row_max: Floats, hop_max: Floats, sums: Floats,
    rows: Floats, undo: Floats, p: int, q: int, blend: float, allowance: float,
) -> bool:  # fmt: skip
    """Exchange the nodes at positions p (in the grid) and q (another stage, or spare).

    Done if the cost rises by at most `allowance`. Long because everything is kept in registers.
    """
    stages, slots = row_now.shape
    a, b = at[p], at[q]
    s, t = p // slots, q // slots
    u, v = p - s * slots, q - t * slots
    spare = t >= stages
    if (pin[a] >= 0 and pin[a] != t) or (pin[b] >= 0 and pin[b] != s):
        return False
    top_s, sum_s = _rows_without(at, row_in, row_out, row_now, s, u, b, rows[0])
    total = sums[ROWS] + sum_s
    for k in range(slots):
        total -= row_now[s, k]
    charges = sums[CHARGES] + charge[b, s] - charge[a, s]
    top_t = 0.0
    if not spare:
        top_t, sum_t = _rows_without(at, row_in, row_out, row_now, t, v, a, rows[1])
        total += sum_t
        for k in range(slots):
            total -= row_now[t, k]
        charges += charge[a, t] - charge[b, t]
    worst = max(top_s, top_t)
    for k in range(stages):
        if k not in (s, t):
            worst = max(worst, row_max[k])
    rise = (1.0 - blend) * (worst - sums[WORST_ROW]) + charges - sums[CHARGES]
    rise += blend * (total - sums[ROWS]) / (stages * slots)

    at[p], at[q] = b, a
    count, pairs, maxima = 0, sums[HOPS], sums[HOP_MAXIMA]
    for end in range(2):
        stage, slot = (s, u) if end == 0 else (t, v)
        if end == 1 and spare:
            break
        for h in range(stage - 1, stage + 1):
            if 0 <= h < stages - 1:
                value = hop[at[h * slots + slot], at[(h + 1) * slots + slot]]
                undo[count, 0], undo[count, 1] = h, slot
                undo[count, 2], undo[count, 3] = hop_now[h, slot], hop_max[h]
                pairs += value - hop_now[h, slot]
                maxima -= hop_max[h]
                _change_hop(hop_now, hop_max, h, slot, value)
                maxima += hop_max[h]
                count += 1
    rise += (1.0 - blend) * (maxima - sums[HOP_MAXIMA]) + blend * (pairs - sums[HOPS]) / slots
    if rise > allowance:
        at[p], at[q] = a, b
        for k in range(count - 1, -1, -1):
            h, slot = int(undo[k, 0]), int(undo[k, 1])
            hop_now[h, slot], hop_max[h] = undo[k, 2], undo[k, 3]
        return False
    row_now[s, :] = rows[0]
    row_max[s] = top_s
    if not spare:
        row_now[t, :] = rows[1]
        row_max[t] = top_t
    sums[ROWS], sums[HOPS], sums[CHARGES] = total, pairs, charges
    sums[WORST_ROW], sums[HOP_MAXIMA] = worst, maxima
    return True


@compiled
def _hop_if_crossed(
    at: Ints, hop: Floats, hop_now: Floats, hop_max: Floats, h: int, u: int, v: int
) -> tuple[float, float, float]:
    """Hop `h` if lanes u and v crossed in it: its maximum, pair u, pair v."""
    slots = hop_now.shape[1]
    near, far = h * slots, (h + 1) * slots
    first, second = hop[at[near + u], at[far + v]], hop[at[near + v], at[far + u]]
    top = max(first, second)
    if top >= hop_max[h]:
        return top, first, second
    if hop_now[h, u] < hop_max[h] and hop_now[h, v] < hop_max[h]:
        return hop_max[h], first, second
    for k in range(slots):
        if k not in (u, v):
            top = max(top, hop_now[h, k])
    return top, first, second


@compiled
def _cross(
    at: Ints, hop: Floats, row_now: Floats, hop_now: Floats, hop_max: Floats, sums: Floats,
    start: int, stop: int, u: int, v: int, blend: float, allowance: float,
) -> bool:  # fmt: skip
    """Exchange lanes u and v in the stages [start, stop): stages keep their nodes."""
    stages, slots = row_now.shape
    maxima, pairs = sums[HOP_MAXIMA], sums[HOPS]
    top_in, top_out, in_u, in_v, out_u, out_v = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if start > 0:
        h = start - 1
        top_in, in_u, in_v = _hop_if_crossed(at, hop, hop_now, hop_max, h, u, v)
        maxima += top_in - hop_max[h]
        pairs += in_u + in_v - hop_now[h, u] - hop_now[h, v]
    if stop < stages:
        h = stop - 1
        top_out, out_u, out_v = _hop_if_crossed(at, hop, hop_now, hop_max, h, v, u)
        maxima += top_out - hop_max[h]
        pairs += out_u + out_v - hop_now[h, u] - hop_now[h, v]
    rise = (1.0 - blend) * (maxima - sums[HOP_MAXIMA]) + blend * (pairs - sums[HOPS]) / slots
    if rise > allowance:
        return False
    for s in range(start, stop):
        x, y = s * slots + u, s * slots + v
        at[x], at[y] = at[y], at[x]
        row_now[s, u], row_now[s, v] = row_now[s, v], row_now[s, u]
        hop_now[s, u], hop_now[s, v] = hop_now[s, v], hop_now[s, u]
    if start > 0:
        hop_now[start - 1, u], hop_now[start - 1, v] = in_u, in_v
        hop_max[start - 1] = top_in
    if stop < stages:
        hop_now[stop - 1, u], hop_now[stop - 1, v] = out_u, out_v
        hop_max[stop - 1] = top_out
    sums[HOP_MAXIMA], sums[HOPS] = maxima, pairs
    return True


COOLING_STEP = 128
"""Moves between two changes of temperature and blend."""
RESOLUTION = 2.0**-31


@compiled
def anneal(
    at: Ints, row_in: Floats, row_out: Floats, hop: Floats, charge: Floats, pin: Ints,
    row_now: Floats, hop_now: Floats, row_max: Floats, hop_max: Floats, sums: Floats,
    best: Ints, schedule: Floats, word: Words, first: int, last: int, total: int,
) -> float:  # fmt: skip
    """Try the moves [first, last) of a run of `total`; returns the least cost seen, its grid in
    `best`.

    `schedule` is: greatest and least temperature, first blend, share of the run at which the
    blend is 0, share of the moves that exchange nodes, and the least cost so far.
    """
    stages, slots = row_now.shape
    rows, undo = np.empty((2, slots)), np.empty((4, 4))
    refresh(at, row_out, hop, charge, row_now, hop_now, row_max, hop_max, sums)
    num_nodes, in_grid = len(at), stages * slots
    temperature, blend, least = schedule[0], schedule[2], float(schedule[5])
    swap_below = np.int64(schedule[4] * 2.0**31)
    for move in range(first, last):
        if (move - first) % COOLING_STEP == 0:
            done = move / total
            temperature = schedule[0] * (schedule[1] / schedule[0]) ** done
            blend = schedule[2] * max(0.0, 1.0 - done / schedule[3])
        allowance = -temperature * np.log((draw(word) + 1) * RESOLUTION)
        done_it = False
        if draw(word) < swap_below:
            p, q = below(word, in_grid), below(word, num_nodes)
            if p // slots != q // slots or q >= in_grid:
                done_it = _swap(
                    at, row_in, row_out, hop, charge, pin, row_now, hop_now, row_max, hop_max,
                    sums, rows, undo, p, q, blend, allowance,
                )  # fmt: skip
        else:
            u, v = below(word, slots), below(word, slots)
            start = below(word, stages)
            stop = start + 1 + below(word, stages - start)
            if u != v:
                done_it = _cross(
                    at, hop, row_now, hop_now, hop_max, sums, start, stop, u, v, blend, allowance
                )
        if done_it:
            cost = sums[WORST_ROW] + sums[HOP_MAXIMA] + sums[CHARGES]
            if cost < least * (1.0 - 1e-12):
                least = cost
                best[:] = at
    schedule[5] = least
    return least
