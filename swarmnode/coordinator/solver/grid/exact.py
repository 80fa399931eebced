"""Proven optima of the grid objective for at most 16 nodes, by dynamic programming over subsets.

A stage is a group of V nodes. Stages form a path, so the least sum of hops over all ways to use
the nodes in a set and to end in a group of it follows from the sets that are one group smaller
(Held and Karp's recurrence, over groups instead of cities). The dearest group is a maximum and not
a sum: the path is solved again and again with only those groups that are cheap enough to win.

Letters: G groups, V nodes of a group, S stages, N nodes, M sets of one size, L groups of a set.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

from swarmnode.coordinator.solver.compiled import compiled
from swarmnode.errors import CapacityError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MAX_EXACT_NODES = 16


@dataclass(frozen=True)
class Exact:
    """An arrangement that nothing beats, and its cost with the charges."""

    slots: tuple[tuple[int, ...], ...]
    cost_s: float


@dataclass(frozen=True)
class _Groups:
    """Everything about all groups; a group is a bit mask, and they are in ascending order."""

    num_nodes: int
    num_stages: int
    members: Ints
    reduce_s: Floats
    charge_s: Floats
    """inf where a pin forbids the group in the stage."""
    hop_s: Floats
    rank: Ints
    """Of every set of nodes, its place among the sets of the same size."""
    size: Ints
    """Of every set of nodes, how many it has."""

    @property
    def width(self) -> int:
        return int(self.members.shape[1])

    def sets(self, size: int) -> Ints:
        """All sets of `size` nodes, ascending."""
        return np.flatnonzero(self.size == size).astype(np.int64)


def exact_grid(
    reduce_s: Floats,
    hop_s: Floats,
    num_stages: int,
    num_slots: int,
    *,
    charge_s: Floats | None = None,
    pins: Mapping[int, int] | None = None,
) -> Exact | None:
    """The cheapest grid, proven; None if every grid uses a missing link or breaks a pin.

    Cost: the dearest node's row sum of `reduce_s` within its stage, plus every hop's dearest pair
    under the best pairing, plus `charge_s` of each (node, stage) that is used.
    Shapes: reduce_s and hop_s (N, N), inf for no link, hop_s symmetric; charge_s (N, S).
    pins: node -> the stage that it must be in.
    Raises: CapacityError for more than 16 nodes, or fewer than the grid has.
    """
    count = len(reduce_s)
    if not num_stages * num_slots <= count <= MAX_EXACT_NODES:
        raise CapacityError(
            f"{count} nodes for {num_stages} x {num_slots} slots; the exact method needs a node "
            f"for each slot and at most {MAX_EXACT_NODES}"
        )
    assert np.array_equal(hop_s, hop_s.T), "a hop is used forth and back: its costs are symmetric"
    groups = _all_groups(reduce_s, hop_s, num_stages, num_slots, charge_s, pins or {})
    if num_stages == 2:
        path, cost_s = _best_pair(groups)
    else:
        path, cost_s = _best_path(groups)
    if not path:
        return None
    return Exact(_columns([groups.members[g] for g in path], hop_s), cost_s)


def _all_groups(
    reduce_s: Floats,
    hop_s: Floats,
    num_stages: int,
    num_slots: int,
    charge_s: Floats | None,
    pins: Mapping[int, int],
) -> _Groups:
    count = len(reduce_s)
    bits = (np.arange(1 << count)[:, None] >> np.arange(count)) & 1
    size = bits.sum(axis=1)
    order = np.argsort(size, kind="stable")
    starts = np.cumsum([0] + [comb(count, k) for k in range(count)])
    rank = np.empty(1 << count, dtype=np.int64)
    rank[order] = np.arange(1 << count) - starts[size[order]]
    has_GN = bits[size == num_slots].astype(bool)
    members = np.nonzero(has_GN)[1].reshape(-1, num_slots).astype(np.int64)
    off_diagonal = np.where(np.eye(count, dtype=bool), 0.0, reduce_s)
    rows = off_diagonal[members[:, :, None], members[:, None, :]].sum(axis=2)
    charges = np.zeros((len(members), num_stages))
    if charge_s is not None:
        charges = charge_s[members].sum(axis=1)
    for node, stage in sorted(pins.items()):
        wanted = np.arange(num_stages) == stage
        charges[has_GN[:, node, None] != wanted] = np.inf
    return _Groups(
        num_nodes=count,
        num_stages=num_stages,
        members=members,
        reduce_s=rows.max(axis=1),
        charge_s=charges,
        hop_s=np.ascontiguousarray(hop_s, dtype=np.float64),
        rank=rank,
        size=size.astype(np.int64),
    )


def _best_pair(groups: _Groups) -> tuple[list[int], float]:
    """Two stages: every pair of groups is looked at, so nothing has to be stored."""
    first, second, cost_s = _scan_pairs(
        groups.members,
        groups.sets(groups.width),
        groups.reduce_s,
        groups.charge_s,
        groups.hop_s,
    )
    return ([int(first), int(second)] if first >= 0 else []), float(cost_s)


def _best_path(groups: _Groups) -> tuple[list[int], float]:
    """Lower the limit on a group's reduction until no path is left that could win.

    Each path is the cheapest below its limit, so every later one costs at least as much: to win
    it has to save on the reduction what the limit says.
    """
    hops_GG = np.empty((0, 0))
    if groups.num_stages > 1:
        hops_GG = _all_hops(groups.members, groups.sets(groups.width), groups.hop_s)
    least_s = _least_reduction(groups)
    best: list[int] = []
    best_s = limit_s = np.inf
    while True:
        allowed = groups.reduce_s < limit_s
        path, pipeline_s = _cheapest_path(groups, hops_GG, allowed, best_s - least_s)
        if not path:
            return best, best_s
        reduction_s = float(groups.reduce_s[path].max())
        if reduction_s + pipeline_s < best_s:
            best, best_s = path, reduction_s + pipeline_s
        limit_s = min(reduction_s, best_s - pipeline_s)


def _least_reduction(groups: _Groups) -> float:
    """A floor of the dearest group: each placed node is in a group, at best in its cheapest."""
    cheapest = np.full(groups.num_nodes, np.inf)
    np.minimum.at(cheapest, groups.members, groups.reduce_s[:, None])
    return float(np.sort(cheapest)[groups.num_stages * groups.width - 1])


def _cheapest_path(
    groups: _Groups, hops_GG: Floats, allowed: NDArray[np.bool_], ceiling_s: float
) -> tuple[list[int], float]:
    """The path of allowed groups with the least hops and charges, if it is below the ceiling."""
    charges = np.where(allowed[:, None], groups.charge_s, np.inf)
    layers = [charges[:, :1].copy()]
    for stage in range(1, groups.num_stages):
        sets = groups.sets(stage * groups.width)
        shape = (
            comb(groups.num_nodes, (stage + 1) * groups.width),
            comb((stage + 1) * groups.width, groups.width),
        )
        grown = np.full(shape, np.inf)
        charge = np.ascontiguousarray(charges[:, stage])
        _grow(
            layers[-1], sets, groups.members, groups.rank, groups.size, hops_GG, charge,
            ceiling_s, groups.num_nodes, grown,
        )  # fmt: skip
        layers.append(grown)
    if not layers[-1].min(initial=np.inf) < ceiling_s:
        return [], np.inf
    return _retrace(groups, hops_GG, layers), float(layers[-1].min())


def _retrace(groups: _Groups, hops_GG: Floats, layers: list[Floats]) -> list[int]:
    """The groups of the cheapest path, found backwards: no parent was stored."""
    path: list[int] = []
    last = -1
    used = 0
    for stage in range(groups.num_stages - 1, -1, -1):
        sets = groups.sets((stage + 1) * groups.width)
        if last < 0:
            row, sub = divmod(int(np.argmin(layers[stage])), layers[stage].shape[1])
            used = int(sets[row])
        else:
            lasts = [_group_in(groups, used, k) for k in range(layers[stage].shape[1])]
            sub = int(np.argmin(layers[stage][groups.rank[used]] + hops_GG[last, lasts]))
        last = _group_in(groups, used, sub)
        path.append(last)
        used &= ~int((1 << groups.members[last]).sum())
    return path[::-1]


def _group_in(groups: _Groups, used: int, sub: int) -> int:
    """The number of the `sub`-th group inside the set `used`."""
    nodes = [node for node in range(groups.num_nodes) if used >> node & 1]
    return int(groups.rank[sum(1 << nodes[k] for k in groups.members[sub])])


def _columns(rows: Sequence[Ints], hop_s: Floats) -> tuple[tuple[int, ...], ...]:
    """The groups with their nodes in the order that makes every hop as cheap as it can be."""
    slots = [tuple(int(node) for node in rows[0])]
    for row in rows[1:]:
        partner = _pairing(slots[-1], row, hop_s)
        slots.append(tuple(int(row[k]) for k in partner))
    return tuple(slots)


def _pairing(left: Sequence[int], right: Ints, hop_s: Floats) -> list[int]:
    """For every node on the left its partner's place on the right; the dearest pair is cheapest."""
    width = len(left)
    cost = np.full(1 << width, np.inf)
    cost[0] = 0.0
    choice = np.zeros(1 << width, dtype=np.int64)
    for taken in range(1, 1 << width):
        node = left[taken.bit_count() - 1]
        for k in range(width):
            if taken >> k & 1:
                total = max(cost[taken ^ (1 << k)], hop_s[node, right[k]])
                if total < cost[taken]:
                    cost[taken], choice[taken] = total, k
    taken = (1 << width) - 1
    partners = []
    while taken:
        partners.append(int(choice[taken]))
        taken ^= 1 << partners[-1]
    return partners[::-1]


@compiled
def _bottleneck(left: Ints, right: Ints, hop_s: Floats, cost: Floats, size: Ints) -> float:
    """The dearest pair of the best pairing; `cost` is room for a number per subset of the right."""
    width = len(left)
    cost[0] = 0.0
    for taken in range(1, 1 << width):
        node = left[size[taken] - 1]
        least = np.inf
        for k in range(width):
            if taken >> k & 1:
                total = max(cost[taken ^ (1 << k)], hop_s[node, right[k]])
                least = min(least, total)
        cost[taken] = least
    return float(cost[(1 << width) - 1])


@compiled
def _sizes(width: int) -> Ints:
    """How many bits each number below 2^width has."""
    size = np.zeros(1 << width, dtype=np.int64)
    for taken in range(1, 1 << width):
        size[taken] = size[taken >> 1] + (taken & 1)
    return size


@compiled
def _all_hops(members_GV: Ints, sets_G: Ints, hop_s: Floats) -> Floats:
    """What the hop between two disjoint groups costs; inf if they share a node. Shapes: (G, G)."""
    count, width = members_GV.shape
    hops = np.full((count, count), np.inf)
    size, room = _sizes(width), np.empty(1 << width)
    for a in range(count):
        for b in range(a):
            if not sets_G[a] & sets_G[b]:
                cost = _bottleneck(members_GV[a], members_GV[b], hop_s, room, size)
                hops[a, b] = cost
                hops[b, a] = cost
    return hops


@compiled
def _scan_pairs(
    members_GV: Ints, sets_G: Ints, reduce_s_G: Floats, charge_s: Floats, hop_s: Floats
) -> tuple[int, int, float]:
    """The best two disjoint groups for stages 0 and 1 and their cost; -1 if there are none."""
    count, width = members_GV.shape
    size, room = _sizes(width), np.empty(1 << width)
    best, first, second = np.inf, -1, -1
    for a in range(count):
        for b in range(a):
            if sets_G[a] & sets_G[b]:
                continue
            forth = charge_s[a, 0] + charge_s[b, 1]
            back = charge_s[b, 0] + charge_s[a, 1]
            known = max(reduce_s_G[a], reduce_s_G[b]) + min(forth, back)
            if not known < best:
                continue
            cost = known + _bottleneck(members_GV[a], members_GV[b], hop_s, room, size)
            if cost < best:
                best = cost
                first, second = (a, b) if forth <= back else (b, a)
    return first, second, best


@compiled
def _grow(
    values_ML: Floats,
    sets_M: Ints,
    members_GV: Ints,
    rank: Ints,
    size: Ints,
    hops_GG: Floats,
    charge_s_G: Floats,
    ceiling_s: float,
    num_nodes: int,
    grown_ML: Floats,
) -> None:
    """Append one group to every path; writes the least sum per (set, last group) into grown_ML.

    Above 40 lines because the inner loop runs 60 million times for 4 x 4, and the tables that it
    reads are filled by the loops around it.
    """
    width = members_GV.shape[1]
    lasts = np.empty(values_ML.shape[1], dtype=np.int64)
    sums = np.empty(values_ML.shape[1])
    inside = np.empty(num_nodes, dtype=np.int64)
    outside = np.empty(num_nodes, dtype=np.int64)
    for m in range(len(sets_M)):
        num_in, num_out = 0, 0
        for node in range(num_nodes):
            if sets_M[m] >> node & 1:
                inside[num_in] = node
                num_in += 1
            else:
                outside[num_out] = node
                num_out += 1
        alive = 0
        for sub in range(values_ML.shape[1]):
            if values_ML[m, sub] < ceiling_s:
                group = 0
                for k in range(width):
                    group |= 1 << inside[members_GV[sub, k]]
                lasts[alive], sums[alive] = rank[group], values_ML[m, sub]
                alive += 1
        if not alive:
            continue
        for sub in range(len(members_GV)):
            if members_GV[sub, width - 1] >= num_out:
                break
            group = 0
            for k in range(width):
                group |= 1 << outside[members_GV[sub, k]]
            new = rank[group]
            if not charge_s_G[new] < ceiling_s:
                continue
            least = np.inf
            for j in range(alive):
                least = min(least, sums[j] + hops_GG[new, lasts[j]])
            least += charge_s_G[new]
            union, place = group | sets_M[m], 0
            for k in range(width):
                below = (1 << outside[members_GV[sub, k]]) - 1
                place |= 1 << size[union & below]
            if least < grown_ML[rank[union], rank[place]]:
                grown_ML[rank[union], rank[place]] = least
