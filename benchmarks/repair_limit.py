"""Whether a repair stops short, or the limit on nodes that move does: a beam search beside it.

    python benchmarks/repair_limit.py [--swarms 16] [--width 100] [--most-moved 5]

Four of 64 nodes of an irregular swarm are replaced. The repair and a search from nothing are the
product's; the beam search shares no code with them. It begins with every way to seat the four
newcomers, tries every exchange of two nodes of different stages at each depth and keeps the
`--width` cheapest arrangements in which no more survivors than allowed have left their stage.
Prints a JSON line for each swarm and a table: what is above the search from nothing, in percent.
"""

import argparse
import json
import time
from itertools import permutations
from typing import Any

import numpy as np
from _environment import environment
from networks import irregular_swarm
from numba import njit
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from swarmnode.coordinator.cost.dtfm import ACTIVATION_BYTES, GRADIENT_BYTES
from swarmnode.coordinator.objective import NOBODY, Arrangement, Effort
from swarmnode.coordinator.planning.problem import BYTES_PER_STATE_WEIGHT, DEFAULT_HORIZON_STEPS
from swarmnode.coordinator.solver.grid.dtfm import DtfmObjective
from swarmnode.coordinator.solver.search import solve
from swarmnode.coordinator.transition import charges

STAGES, SLOTS, REPLACED, DEPTH = 8, 8, 4, 8
NODES = STAGES * SLOTS
COLD_MOVES, REPAIR_MOVES = 44_000_000, 20_000_000

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@njit(cache=True)
def _is_paired(way_s: Floats, top_s: float, back: Ints, seen: Ints, i: int) -> bool:
    for j in range(SLOTS):
        if way_s[i, j] <= top_s and not seen[j]:
            seen[j] = 1
            if back[j] < 0 or _is_paired(way_s, top_s, back, seen, back[j]):
                back[j] = i
                return True
    return False


@njit(cache=True)
def hop_cost(hop_s: Floats, at: Ints, h: int) -> float:
    """The dearest pair of the best pairing between stages h and h + 1. Shapes: at (S * V,)."""
    way_s = np.empty((SLOTS, SLOTS))
    for i in range(SLOTS):
        for j in range(SLOTS):
            way_s[i, j] = hop_s[at[h * SLOTS + i], at[(h + 1) * SLOTS + j]]
    values = np.sort(way_s.ravel())
    low, high = SLOTS - 1, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        back, fits = np.full(SLOTS, -1), True
        for i in range(SLOTS):
            fits = fits and _is_paired(way_s, values[middle], back, np.zeros(SLOTS, np.int64), i)
        low, high = (low, middle) if fits else (middle + 1, high)
    return float(values[low])


@njit(cache=True)
def row_cost(reduce_s: Floats, at: Ints, s: int) -> float:
    """The dearest node of the reduction of stage s."""
    top = 0.0
    for i in range(SLOTS):
        total = 0.0
        for j in range(SLOTS):
            if i != j:
                total += reduce_s[at[s * SLOTS + i], at[s * SLOTS + j]]
        top = max(top, total)
    return top


@njit(cache=True)
def exchanges(
    reduce_s: Floats, hop_s: Floats, home: Ints, at: Ints, most: int, costs: Floats, pairs: Ints
) -> int:
    """What each exchange that is allowed would cost; returns how many there are."""
    rows_s = np.array([row_cost(reduce_s, at, s) for s in range(STAGES)])
    hops_s = np.array([hop_cost(hop_s, at, h) for h in range(STAGES - 1)])
    num_away, count = 0, 0
    for p in range(NODES):
        num_away += home[at[p]] >= 0 and home[at[p]] != p // SLOTS
    for p in range(NODES):
        for q in range((p // SLOTS + 1) * SLOTS, NODES):
            s, t, a, b = p // SLOTS, q // SLOTS, at[p], at[q]
            more = (home[a] >= 0) * (int(home[a] != t) - int(home[a] != s))
            more += (home[b] >= 0) * (int(home[b] != s) - int(home[b] != t))
            if num_away + more > most:
                continue
            at[p], at[q] = b, a
            row_s, total = 0.0, 0.0
            for x in range(STAGES):
                row_s = max(row_s, row_cost(reduce_s, at, x) if x in (s, t) else rows_s[x])
            for h in range(STAGES - 1):
                is_new = h in (s - 1, s, t - 1, t)
                total += hop_cost(hop_s, at, h) if is_new else hops_s[h]
            at[p], at[q] = a, b
            costs[count], pairs[count] = row_s + total, p * NODES + q
            count += 1
    return count


def beam_search(
    reduce_s: Floats, hop_s: Floats, home: Ints, starts: list[Ints], most: int, width: int
) -> float:
    """The least cost seen. home: (N,) the stage of a survivor, -1 for a newcomer."""
    costs, pairs = np.empty(NODES**2), np.empty(NODES**2, np.int64)
    front, seen, least = starts, {_stages(at) for at in starts}, float("inf")
    for _ in range(DEPTH):
        found: list[tuple[float, int, int]] = []
        for number, at in enumerate(front):
            count = exchanges(reduce_s, hop_s, home, at.copy(), most, costs, pairs)
            order = np.argsort(costs[:count], kind="stable")[: 4 * width]
            found += [(float(costs[k]), number, int(pairs[k])) for k in order]
        after: list[Ints] = []
        for cost_s, number, pair in sorted(found):
            p, q = divmod(pair, NODES)
            at = front[number].copy()
            at[p], at[q] = at[q], at[p]
            if (stages := _stages(at)) not in seen:
                seen.add(stages)
                after.append(at)
                least = min(least, cost_s)
            if len(after) == width:
                break
        front = after
    return least


def _stages(at: Ints) -> tuple[int, ...]:
    """Which node is in which stage, whoever its partners are."""
    return tuple(np.sort(at.reshape(STAGES, SLOTS), axis=1).ravel().tolist())


def compare(swarm: int, most: int, width: int) -> dict[str, Any]:
    """One swarm of which four nodes are replaced."""
    world, random = irregular_swarm(NODES + REPLACED, swarm), np.random.default_rng(swarm)

    def objective(here: list[int]) -> DtfmObjective:
        return DtfmObjective(
            world.take(here), STAGES, SLOTS, gradient_bytes=GRADIENT_BYTES,
            activation_bytes=ACTIVATION_BYTES, most_moved=most,
        )  # fmt: skip

    cold = Effort(moves=COLD_MOVES)
    old = solve(objective(list(range(NODES))), effort=cold).arrangement
    gone = set(random.choice(NODES, REPLACED, replace=False).tolist())
    here = [n for n in range(NODES + REPLACED) if n not in gone]
    index = {node: i for i, node in enumerate(here)}
    rows = np.array([[index.get(n, NOBODY) for n in row] for row in old.slots])
    changed = objective(here)
    cold_s = solve(changed, effort=cold).cost_s
    state = [BYTES_PER_STATE_WEIGHT / 4 * GRADIENT_BYTES] * STAGES
    kept = Arrangement(tuple(map(tuple, rows.tolist())), old.layers)
    previous = charges(kept, changed.topology, state, DEFAULT_HORIZON_STEPS)
    repair = solve(changed, previous=previous, effort=Effort(moves=REPAIR_MOVES))
    home = np.full(NODES, -1)
    home[rows[rows != NOBODY]] = np.nonzero(rows != NOBODY)[0]
    starts = []
    for newcomers in permutations(range(NODES - REPLACED, NODES)):
        at = rows.ravel().astype(np.int64)
        at[at == NOBODY] = newcomers
        starts.append(at)
    began_s = time.process_time()
    beam_s = beam_search(changed.reduce_s, changed.hop_s, home, starts, most, width)
    return {
        "swarm": swarm, "most_moved": most, "width": width, "cold_s": cold_s,
        "repair_s": repair.cost_s, "num_moved": len(repair.moved), "beam_s": beam_s,
        "repair_over_cold": repair.cost_s / cold_s - 1.0, "beam_over_cold": beam_s / cold_s - 1.0,
        "beam_cpu_s": time.process_time() - began_s,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--swarms", type=int, default=16)
    parser.add_argument("--width", type=int, default=100)
    parser.add_argument("--most-moved", type=int, default=5)
    options = parser.parse_args()
    facts, stderr = environment(["numpy", "numba"]), Console(stderr=True)
    table = Table("swarm", "repair, %", "beam search, %", title="above a search from nothing")
    for swarm in track(range(options.swarms), "swarms", console=stderr):
        found = compare(swarm, options.most_moved, options.width)
        print(json.dumps({"bench": "repair limit", **found, **facts}), flush=True)
        shares = (f"{100 * found[f'{who}_over_cold']:.1f}" for who in ("repair", "beam"))
        table.add_row(str(swarm), *shares)
    stderr.print(table)


if __name__ == "__main__":
    main()
