"""Who sends to whom between two neighbouring stages, kept best while nodes change, compiled.

`partner[h, i]` is the seat in stage h + 1 that seat i of stage h sends to, `back` is its inverse;
-1 for a seat that is not paired yet.
"""

import numpy as np
from numpy.typing import NDArray

from swarmnode.coordinator.solver.compiled import compiled

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FREE = -1


@compiled
def _augment(
    at: Ints, hop: Floats, partner: Ints, back: Ints, h: int, u: int, limit: float,
    reach: Floats, came: Ints, done: Ints,
) -> float:  # fmt: skip
    """Pair seat `u` of stage h, changing other pairs, so that the dearest new pair is cheapest.

    The pairs stay as they are, and `limit` is returned, if some new pair must cost that much.
    """
    slots = partner.shape[1]
    near, far = h * slots, (h + 1) * slots
    node = at[near + u]
    for j in range(slots):
        reach[j] = hop[node, at[far + j]]
        came[j], done[j] = u, 0
    while True:
        best, nearest = limit, FREE
        for j in range(slots):
            if done[j] == 0 and reach[j] < best:
                best, nearest = reach[j], j
        if nearest == FREE:
            return limit
        done[nearest] = 1
        i = back[h, nearest]
        if i == FREE:
            break
        node = at[near + i]
        for j in range(slots):
            if done[j] == 0:
                value = max(best, hop[node, at[far + j]])
                if value < reach[j]:
                    reach[j], came[j] = value, i
    j = nearest
    while True:
        i = came[j]
        after = partner[h, i]
        partner[h, i], back[h, j] = j, i
        if i == u:
            return best
        j = after


@compiled
def settle(
    at: Ints, hop: Floats, partner: Ints, back: Ints, h: int, floor: float, limit: float,
    reach: Floats, came: Ints, done: Ints,
) -> float:  # fmt: skip
    """Pair what is unpaired in hop `h`, then replace the dearest pair while that helps.

    Exact: if all pairs could be cheaper than the dearest one, its two ends would be joined by a
    path of cheaper pairs. Returns what the dearest pair costs, which is at least `floor`; inf,
    with seats left unpaired, if it must cost `limit`.
    """
    slots = partner.shape[1]
    near, far = h * slots, (h + 1) * slots
    for u in range(slots):
        if partner[h, u] != FREE:
            continue
        if _augment(at, hop, partner, back, h, u, limit, reach, came, done) >= limit:
            return np.inf
    while True:
        top, u = -1.0, 0
        for i in range(slots):
            value = hop[at[near + i], at[far + partner[h, i]]]
            if value > top:
                top, u = value, i
        if top <= floor:
            return top
        v = partner[h, u]
        partner[h, u], back[h, v] = FREE, FREE
        if _augment(at, hop, partner, back, h, u, top, reach, came, done) >= top:
            partner[h, u], back[h, v] = v, u
            return top


@compiled
def release(partner: Ints, back: Ints, stage: int, seat: int) -> None:
    """Unpair a seat on both sides."""
    if stage > 0 and back[stage - 1, seat] != FREE:
        partner[stage - 1, back[stage - 1, seat]] = FREE
        back[stage - 1, seat] = FREE
    if partner[stage, seat] != FREE:
        back[stage, partner[stage, seat]] = FREE
        partner[stage, seat] = FREE
