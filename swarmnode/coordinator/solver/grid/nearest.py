"""What a hop takes at least, in a few steps: nobody is quicker than with the nearest partner.

The rule rather than the exception is that this is all that binds a hop, so nearly every move that
would be refused is refused here, without pairing anybody. Compiled. Hops take as long in both
directions.

`low[n, s]` is the quickest way between node n and another node of stage s. Of the seats beside
hop h, `lone[h, side]` is the one whose quickest way across takes longest, `ways[h, side, 0]` is
how long, `ways[h, side, 1]` how long it is for the next one; side 0 is stage h, 1 is stage h + 1.
"""

import numpy as np
from numpy.typing import NDArray

from swarmnode.coordinator.solver.compiled import compiled, inlined
from swarmnode.coordinator.solver.grid.pairing import FREE

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@compiled
def find_low(at: Ints, hop: Floats, low: Floats, slots: int, n: int, s: int) -> None:
    """Look for the nearest of stage s to node n. Shapes: low (N, S)."""
    least = np.inf
    for k in range(slots):
        node = at[s * slots + k]
        if node != n:
            least = min(least, hop[n, node])
    low[n, s] = least


@compiled
def change_lows(
    at: Ints, hop: Floats, low: Floats, slots: int, s: int, goes: int, comes: int
) -> None:
    """Stage s has `comes` now instead of `goes`: a search only for those who lose the nearest."""
    for n in range(len(at)):
        if n in (goes, comes) or hop[n, goes] <= low[n, s]:
            find_low(at, hop, low, slots, n, s)
        else:
            low[n, s] = min(low[n, s], hop[n, comes])


@compiled
def find_lone(at: Ints, low: Floats, lone: Ints, ways: Floats, slots: int, h: int) -> None:
    """The loneliest seats beside hop h. Shapes: lone (S, 2), ways (S, 2, 2)."""
    for side in range(2):
        first, second, seat = -1.0, -1.0, 0
        for k in range(slots):
            value = low[at[(h + side) * slots + k], h + 1 - side]
            if value > first:
                first, second, seat = value, first, k
            else:
                second = max(second, value)
        lone[h, side], ways[h, side, 0], ways[h, side, 1] = seat, first, second


@inlined
def floor_of_hop(
    at: Ints, hop: Floats, low: Floats, lone: Ints, ways: Floats, slots: int,
    h: int, u: int, v: int, a: int, b: int,
) -> float:  # fmt: skip
    """What hop h takes at least if `a` takes seat u of its near stage, and `b` v of its far one.

    -1 for a seat that stays as it is.
    """
    i, j = lone[h, 0], lone[h, 1]
    if v == FREE:
        top = max(low[a, h + 1], ways[h, 0, 1] if i == u else ways[h, 0, 0])
        return float(max(top, min(ways[h, 1, 0], hop[a, at[(h + 1) * slots + j]])))
    if u == FREE:
        top = max(low[b, h], ways[h, 1, 1] if j == v else ways[h, 1, 0])
        return float(max(top, min(ways[h, 0, 0], hop[at[h * slots + i], b])))
    top = float(min(max(low[a, h + 1], low[b, h]), hop[a, b]))
    if i != u:
        top = max(top, min(ways[h, 0, 0], hop[at[h * slots + i], b]))
    if j != v:
        top = max(top, min(ways[h, 1, 0], hop[a, at[(h + 1) * slots + j]]))
    return float(top)
