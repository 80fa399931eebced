"""The closed form of one training step, written once: plain loops over arrays.

Python runs these functions for a price; the search compiles the very same ones with numba. That
is why they take all they read as arguments, fill arrays that the caller owns, and do not call
each other.

Shapes: N machines, S stages, V pipelines. `grid` (S, V) holds the host of each slot. Everything
is in seconds and bytes, of one microbatch unless a name says otherwise.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Rows of `stage`, (NUM_STAGE_ROWS, S).
FLOPS, TOUCHED, SLOT_BYTES, STATE_BYTES, OWN_WEIGHTS, WEIGHTS, FINISH_S = range(7)
NUM_STAGE_ROWS = 7
# Rows of `machine`, (NUM_MACHINE_ROWS, N): of one round, that is one microbatch in every slot.
USED, COMPUTE_S, OUT_S, IN_S, APPLY_S, STAMP, BEFORE_S = range(7)
SHARE_OUT_S, SHARE_IN_S, SUM_OUT_S, SUM_IN_S = range(7, 11)
NUM_MACHINE_ROWS = 11
# Rows of `column`, (NUM_COLUMN_ROWS, V).
RAMP_S, PERIOD_S, END_S, MEAN_S = range(4)
NUM_COLUMN_ROWS = 4
# Places in `step`.
TOTAL_S, SMOOTH_S, PIPELINES_S, REDUCTION_S, APPLIED_S, WAIT_S = range(6)
NUM_STEP_PLACES = 6

QUEUE_SHARE = 0.5
"""Of a host's other work in a round: what a microbatch waits for at each visit; fitted to the event
simulation over random and over optimised arrangements."""


class Tables(NamedTuple):
    """All that the formula reads, as arrays. A missing link takes infinite seconds."""

    flop_s: Floats
    """(N,) seconds per FLOP."""
    touch_s: Floats
    """(N,) seconds per byte of memory traffic."""
    room_bytes: Floats
    """(N,)"""
    latency_s: Floats
    """(N, N)"""
    forward_out_s: Floats
    """(N, N) the sender's wire, for one activation."""
    forward_in_s: Floats
    """(N, N) the receiver's wire."""
    backward_out_s: Floats
    """(N, N) the same for the activation's gradient."""
    backward_in_s: Floats
    reduce_out_s: Floats
    """(N, N) for the gradient of one weight."""
    reduce_in_s: Floats
    is_allowed: NDArray[np.bool_]
    """(N, S) whether a machine may host a stage."""
    wait_s: Floats
    """(N,) to the coordinator and back."""
    per_layer: Floats
    """(4,) FLOPs, touched bytes besides kept ones, kept bytes of a microbatch, weights."""
    at_end: Floats
    """(2, 4) the same for what the first and the last stage have besides layers."""
    tied_weights: float
    """Weights that first and last stage share; they are reduced among both."""
    per_weight: Floats
    """(4,) state bytes, slot bytes, seconds of hashing; touched bytes to apply an update."""
    num_microbatches: int
    """Of each pipeline."""
    backward_share: float
    reduce_every: float
    staleness: int
    min_nodes: int
    """Fewest machines that must host something."""
    ahead: int = 0
    """Microbatches in flight of stages but the last beyond S - s."""
    cache_bytes: float = 0.0
    """Of each end of a boundary of a slot."""


def fill_stages(counts: Ints, tables: Tables, stage: Floats) -> None:
    """What each stage needs, by its number of layers."""
    num_stages = counts.shape[0]
    for s in range(num_stages):
        flops, touched = tables.per_layer[0] * counts[s], tables.per_layer[1] * counts[s]
        kept, own = tables.per_layer[2] * counts[s], tables.per_layer[3] * counts[s]
        depth = num_stages - s + (tables.ahead if s + 1 < num_stages else 0)
        in_flight = min(depth, tables.num_microbatches)
        extra_kept = 0.0
        for end in range(2):
            if s == end * (num_stages - 1):
                flops += tables.at_end[end, 0]
                touched += tables.at_end[end, 1]
                extra_kept += tables.at_end[end, 2]
                own += tables.at_end[end, 3]
        held = own
        if tables.tied_weights > 0.0 and num_stages > 1 and s in (0, num_stages - 1):
            held = own + tables.tied_weights
        stage[FLOPS, s] = flops
        stage[TOUCHED, s] = touched + 2.0 * (kept + extra_kept)
        num_boundaries = (s > 0) + (s + 1 < num_stages)
        stage[SLOT_BYTES, s] = held * tables.per_weight[1] + kept * in_flight + extra_kept
        stage[SLOT_BYTES, s] += tables.cache_bytes * num_boundaries
        stage[STATE_BYTES, s] = held * tables.per_weight[0]
        stage[OWN_WEIGHTS, s] = own
        stage[WEIGHTS, s] = held


def fill_machines(grid: Ints, tables: Tables, stage: Floats, machine: Floats) -> bool:
    """Each host's memory and its loads in one round; whether all of it fits and is allowed."""
    num_stages, num_slots = grid.shape
    num_nodes = 0
    for s in range(num_stages):
        for v in range(num_slots):
            for row in range(NUM_MACHINE_ROWS):
                machine[row, grid[s, v]] = 0.0
    for s in range(num_stages):
        for v in range(num_slots):
            node = grid[s, v]
            if not tables.is_allowed[node, s]:
                return False
            machine[USED, node] += stage[SLOT_BYTES, s]
            machine[BEFORE_S, node] = np.inf
            if machine[STAMP, node] == 0.0:
                num_nodes += 1
            if machine[STAMP, node] != s + 1.0:
                machine[STAMP, node] = s + 1.0
                machine[USED, node] += stage[STATE_BYTES, s]
                machine[APPLY_S, node] += stage[WEIGHTS, s] * (
                    tables.per_weight[2] + tables.per_weight[3] * tables.touch_s[node]
                )
            if machine[USED, node] > tables.room_bytes[node]:
                return False
            machine[COMPUTE_S, node] += max(
                stage[FLOPS, s] * tables.flop_s[node], stage[TOUCHED, s] * tables.touch_s[node]
            )
            if s + 1 < num_stages:
                after = grid[s + 1, v]
                machine[OUT_S, node] += tables.forward_out_s[node, after]
                machine[IN_S, after] += tables.forward_in_s[node, after]
                machine[OUT_S, after] += tables.backward_out_s[after, node]
                machine[IN_S, node] += tables.backward_in_s[after, node]
    return num_nodes >= tables.min_nodes


def fill_columns(
    grid: Ints, tables: Tables, stage: Floats, machine: Floats, column: Floats
) -> None:
    """Each pipeline's ramp, period and end; each stage's time of its last backward.

    A slot of stage s has at most S - s microbatches in flight, and `ahead` more before the last
    stage, so that every so many cost at least one round trip from s to the end and back, and at
    least as many periods.
    """
    num_stages, num_slots = grid.shape
    further = tables.num_microbatches - 1
    for s in range(num_stages):
        stage[FINISH_S, s] = 0.0
    for v in range(num_slots):
        period, mean, slack = 0.0, 0.0, 0.0
        for s in range(num_stages):
            node = grid[s, v]
            load = max(machine[COMPUTE_S, node], machine[OUT_S, node], machine[IN_S, node])
            period = max(period, load)
            mean += load / num_stages
        trip, queue, slack = 0.0, 0.0, further * period
        for s in range(num_stages - 1, -1, -1):
            node = grid[s, v]
            own = max(
                stage[FLOPS, s] * tables.flop_s[node], stage[TOUCHED, s] * tables.touch_s[node]
            )
            trip += own
            if s + 1 < num_stages:
                after = grid[s + 1, v]
                trip += tables.forward_out_s[node, after] + tables.latency_s[node, after]
                trip += tables.backward_out_s[after, node] + tables.latency_s[after, node]
            load = max(machine[COMPUTE_S, node], machine[OUT_S, node])
            queue += QUEUE_SHARE * max(0.0, load - own)
            window = num_stages - s + (tables.ahead if s + 1 < num_stages else 0)
            rounds = further // window
            around = max(trip + queue, window * period)
            through = rounds * around + (further - rounds * window) * period
            slack = max(slack, through)
        column[RAMP_S, v] = trip
        column[PERIOD_S, v] = slack / max(further, 1)
        column[END_S, v] = trip + slack
        column[MEAN_S, v] = trip + further * mean
        before = 0.0
        for s in range(num_stages):
            node = grid[s, v]
            machine[BEFORE_S, node] = min(machine[BEFORE_S, node], before)
            before += max(
                stage[FLOPS, s] * tables.flop_s[node], stage[TOUCHED, s] * tables.touch_s[node]
            )
            if s + 1 < num_stages:
                after = grid[s + 1, v]
                before += tables.forward_out_s[node, after] + tables.latency_s[node, after]
                before += tables.backward_out_s[after, node] + tables.latency_s[after, node]
    for v in range(num_slots):
        left = column[END_S, v]
        for s in range(num_stages):  # a machine works off all that it hosts, once it has begun
            node = grid[s, v]
            busy = tables.num_microbatches * machine[COMPUTE_S, node]
            left = max(left, machine[BEFORE_S, node] + busy)
        column[END_S, v] = left
        for s in range(num_stages):
            stage[FINISH_S, s] = max(stage[FINISH_S, s], left)
            node = grid[s, v]
            left -= tables.backward_share * max(
                stage[FLOPS, s] * tables.flop_s[node], stage[TOUCHED, s] * tables.touch_s[node]
            )
            if s + 1 < num_stages:
                after = grid[s + 1, v]
                left -= tables.backward_out_s[after, node] + tables.latency_s[after, node]


def add_reduction(members: Ints, weights: float, tables: Tables, machine: Floats) -> float:
    """Add the wire time of one group's reduction to its hosts; its largest latency.

    Each member sends its share of every shard to the shard's owner, and each owner sends the sum
    to every other host once. `members` (K,) are hosts, one for each slot of the group.
    """
    count = members.shape[0]
    shard = weights / count
    longest = 0.0
    for j in range(count):
        target = members[j]
        is_first = True
        for earlier in range(j):
            if members[earlier] == target:
                is_first = False
                break
        for i in range(count):
            source = members[i]
            if source == target:
                continue
            longest = max(longest, tables.latency_s[source, target])
            out_s = shard * tables.reduce_out_s[source, target]
            in_s = shard * tables.reduce_in_s[source, target]
            machine[SHARE_OUT_S, source] += out_s
            machine[SHARE_IN_S, target] += in_s
            if is_first:
                machine[SUM_OUT_S, source] += out_s
                machine[SUM_IN_S, target] += in_s
    return longest


def sum_up(
    grid: Ints, tables: Tables, stage: Floats, machine: Floats, column: Floats,
    latency_s: Floats, step: Floats,
) -> None:  # fmt: skip
    """The step's seconds from everything that the other functions found.

    `latency_s` (S,) is the largest latency in the groups of each stage.
    """
    num_stages, num_slots = grid.shape
    pipelines = mean = 0.0
    for v in range(num_slots):
        pipelines = max(pipelines, column[END_S, v])
        mean += column[MEAN_S, v] / num_slots
    end, mean_reduction, apply_s, wait = pipelines, 0.0, 0.0, 0.0
    for s in range(num_stages):
        share, total = 0.0, 0.0
        for v in range(num_slots):
            node = grid[s, v]
            own_share = max(machine[SHARE_OUT_S, node], machine[SHARE_IN_S, node])
            own_sum = max(machine[SUM_OUT_S, node], machine[SUM_IN_S, node])
            share, total = max(share, own_share), max(total, own_sum)
            mean_reduction += (own_share + own_sum) / (num_stages * num_slots)
            apply_s = max(apply_s, machine[APPLY_S, node])
            wait = max(wait, tables.wait_s[node])
        end = max(end, stage[FINISH_S, s] + share + total + 2.0 * latency_s[s])
    exposed = end - pipelines
    if tables.staleness > 0:
        exposed = max(0.0, exposed - pipelines)
    exposed /= tables.reduce_every
    step[TOTAL_S] = pipelines + exposed + apply_s + wait
    step[SMOOTH_S] = mean + mean_reduction / tables.reduce_every + apply_s + wait
    step[PIPELINES_S] = pipelines
    step[REDUCTION_S] = exposed
    step[APPLIED_S] = apply_s
    step[WAIT_S] = wait
