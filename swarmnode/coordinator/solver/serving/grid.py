"""Compiled: annealing where columns of a grid of S stages and V slots are the only chains.

`seat` lists all nodes: the first S * V sit at stage p // V, slot p % V, the others are idle.
"""

from typing import NamedTuple

import numpy as np

from swarmnode.coordinator.solver.compiled import compiled
from swarmnode.coordinator.solver.serving.annealing import State, draw
from swarmnode.coordinator.solver.serving.kernels import FAR, Ints, Tables


class GridCost(NamedTuple):
    """What one filled grid costs."""

    smooth: float
    total_s: float
    flow: float


@compiled
def grid_cost(seat: Ints, ends: Ints, num_slots: int, tables: Tables, blur: float) -> GridCost:
    """What a grid costs. smooth counts the mean rate of a column by `blur`, beside its least.

    Shapes: seat (N,), ends (S + 1,). Length: one pass over the columns.
    """
    num_stages = len(ends) - 1
    flow, mean, charge, slowest_s, num_faults = 0.0, 0.0, 0.0, 0.0, 0.0
    for v in range(num_slots):
        least, total, late = FAR, 0.0, 0.0
        for s in range(num_stages):
            node, k = seat[s * num_slots + v], ends[s + 1] - ends[s]
            rate = tables.rate[node, k] if k <= tables.most[node] else 0.0
            if rate <= 0.0:
                num_faults += 1.0
            total += min(rate, tables.top)
            if s == 0:
                rate = min(rate, tables.source[node])
            else:
                before = seat[(s - 1) * num_slots + v]
                rate = min(rate, tables.link[before, node])
                late += tables.latency[before, node]
            if s == num_stages - 1:
                rate = min(rate, tables.sink[node])
            least = min(least, rate)
            late += k * tables.layer_s[node]
            if tables.charge[node] > 0.0:
                kept = min(ends[s + 1], tables.old_stop[node])
                kept -= max(ends[s], tables.old_start[node])
                charge += tables.charge[node] * (k - max(0, kept))
        flow += least
        mean += total / num_stages
        if least > 0.0:
            slowest_s = max(slowest_s, late)
    factor = 1.0 + num_faults
    if tables.max_latency_s >= 0.0 and slowest_s > tables.max_latency_s:
        factor *= 1.0 + 10.0 * (slowest_s / max(tables.max_latency_s, 1e-9) - 1.0) + 1e-9
    blended = (1.0 - blur) * flow + blur * mean
    fixed = charge + tables.latency_weight * slowest_s
    smooth = ((1.0 / blended if blended > 1e-290 else FAR) + fixed) * factor
    total_s = 1.0 / flow + fixed if factor <= 1.0 and flow > 0.0 else FAR
    return GridCost(smooth, total_s, flow)


@compiled
def anneal_grid(
    seat: Ints,
    ends: Ints,
    best_seat: Ints,
    best_ends: Ints,
    best_s: float,
    num_slots: int,
    stage_of: Ints,
    is_free: bool,
    tables: Tables,
    state: State,
    done: int,
    num_moves: int,
    of_moves: int,
    blur: float,
    heat: float,
) -> float:
    """Try moves `done` .. `done + num_moves` of `of_moves`; returns the best total_s.

    Changes the four vectors in place. stage_of (N,) pins a node to a stage, -1 leaves it;
    is_free lets boundaries move. Length: one loop, its state in locals so that it stays fast.
    """
    new_seat, new_ends = seat.copy(), ends.copy()
    now_s, at_blur = FAR, 0.0
    for move in range(done, done + num_moves):
        share = move / of_moves
        if (move - done) % 512 == 0:
            at_blur = blur * (1.0 - share) ** 2 if share < 0.9 else 0.0
            now = grid_cost(seat, ends, num_slots, tables, at_blur)
            now_s = now.smooth
            if now.total_s < best_s:
                best_s = now.total_s
                best_seat[:], best_ends[:] = seat, ends
        new_seat[:], new_ends[:] = seat, ends
        if not _propose(new_seat, new_ends, num_slots, stage_of, is_free, state):
            continue
        chance = (draw(state, 1 << 30) + 1) / (1 << 30)
        above = min(FAR, now_s * chance ** (-heat * 300.0 ** (-share)))
        new = grid_cost(new_seat, new_ends, num_slots, tables, at_blur)
        if new.smooth <= above:
            now_s = new.smooth
            seat[:], ends[:] = new_seat, new_ends
            if new.total_s < best_s:
                best_s = new.total_s
                best_seat[:], best_ends[:] = seat, ends
    return best_s


@compiled
def _propose(
    seat: Ints, ends: Ints, num_slots: int, stage_of: Ints, is_free: bool, state: State
) -> bool:
    """Swap two nodes, or the tails of two columns, or shift boundaries by a layer."""
    num_stages = len(ends) - 1
    kind = draw(state, 4)
    if kind == 0 and is_free and num_stages > 1:
        low, high = 1 + draw(state, num_stages - 1), 1 + draw(state, num_stages - 1)
        step = 1 if draw(state, 2) == 0 else -1
        for s in range(min(low, high), max(low, high) + 1):
            ends[s] += step
        return bool(np.all(ends[1:] > ends[:-1]))
    seats = num_slots * num_stages
    if kind == 1 and num_slots > 1:
        u, v = draw(state, num_slots), draw(state, num_slots)
        for s in range(draw(state, num_stages), num_stages):
            a, b = s * num_slots + u, s * num_slots + v
            seat[a], seat[b] = seat[b], seat[a]
        return u != v
    a, b = draw(state, seats), draw(state, len(seat))
    seat[a], seat[b] = seat[b], seat[a]
    return (
        a != b
        and _is_pinned_well(seat, a, num_slots, seats, stage_of)
        and (_is_pinned_well(seat, b, num_slots, seats, stage_of))
    )


@compiled
def _is_pinned_well(seat: Ints, at: int, num_slots: int, seats: int, stage_of: Ints) -> bool:
    wanted = stage_of[seat[at]]
    return wanted < 0 or (at < seats and at // num_slots == wanted)
