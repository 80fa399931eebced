"""Compiled: what a serving placement costs, by an exact maximum flow behind cheap bounds.

A placement is two integer vectors: node i holds the layers [start[i], stop[i]); equal means idle.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from swarmnode.coordinator.solver.compiled import compiled

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
FAR = 1e300
"""Stands for infinity: it survives products."""


class Tables(NamedTuple):
    """The instance and the rules, as the kernels read them. Shapes as in ServingInstance."""

    rate: Floats
    link: Floats
    latency: Floats
    source: Floats
    sink: Floats
    layer_s: Floats
    most: Ints
    """(N,): the most layers that fit on each node; 0 if none."""
    old_start: Ints
    old_stop: Ints
    charge: Floats
    """(N,): total_s per layer that the node holds and did not hold before."""
    num_layers: int
    partial: bool
    max_hops: int
    """0 for no limit."""
    max_latency_s: float
    """Below 0 for no limit."""
    latency_weight: float
    top: float
    """No placement serves more tokens/s."""


class Room(NamedTuple):
    """Memory to work in, so that no move allocates."""

    cover: Floats
    order: Ints
    place: Ints
    hops: Ints
    late: Floats
    first: Ints
    level: Ints
    turn: Ints
    queue: Ints
    path: Ints
    head: Ints
    following: Ints
    left: Floats


class Cost(NamedTuple):
    """What one placement costs."""

    smooth: float
    """What annealing minimises; finite for many placements that carry nothing."""
    total_s: float
    """The true cost with charges; FAR if impossible, beyond a limit, or not looked at."""
    flow: float
    hops: int
    latency_s: float


def make_room(num_nodes: int, num_layers: int) -> Room:
    """Memory for `num_nodes` nodes: arcs for every pair."""
    vertices = 2 * num_nodes + 2
    arcs = num_nodes * num_nodes + 6 * num_nodes
    whole = [np.zeros(vertices, np.int64) for _ in range(5)]
    return Room(
        cover=np.zeros(num_layers + 2),
        order=np.zeros(num_nodes, np.int64),
        place=np.zeros(num_layers + 2, np.int64),
        hops=np.zeros(num_nodes, np.int64),
        late=np.zeros(num_nodes),
        first=whole[0],
        level=whole[1],
        turn=whole[2],
        queue=whole[3],
        path=whole[4],
        head=np.zeros(arcs, np.int64),
        following=np.zeros(arcs, np.int64),
        left=np.zeros(arcs),
    )


@compiled
def cost_of(
    start: Ints, stop: Ints, tables: Tables, room: Room, blur: float, hop_price: float, above: float
) -> Cost:
    """What a placement costs; stops early, with total_s FAR, once smooth is above `above`.

    smooth blends the flow with the mean coverage of a layer by `blur`, and charges e^hop_price
    for each hop beyond the limit. Length: the order of the bounds, cheapest first, is the point.
    """
    cover, count = room.cover, len(start)
    cover[:] = 0.0
    charge = 0.0
    for i in range(count):
        k = stop[i] - start[i]
        if k > 0:
            if k > tables.most[i] or tables.rate[i, k] <= 0.0:
                return Cost(FAR, FAR, 0.0, 0, 0.0)
            cover[start[i]] += tables.rate[i, k]
            cover[stop[i]] -= tables.rate[i, k]
            if tables.charge[i] > 0.0:
                kept = min(stop[i], tables.old_stop[i]) - max(start[i], tables.old_start[i])
                charge += tables.charge[i] * (k - max(0, kept))
    least, mean, running = tables.top, 0.0, 0.0
    for layer in range(tables.num_layers):
        running += cover[layer]
        least = min(least, running)
        mean += min(running, tables.top)
    least = least if least > 1e-9 * tables.top else 0.0
    mean /= tables.num_layers
    smooth = _seconds((1.0 - blur) * least + blur * mean) + charge
    if smooth > above or least == 0.0:
        return Cost(smooth, FAR, 0.0, 0, 0.0)
    used = sort_by_stop(start, stop, tables.num_layers, room)
    hops, latency_s, arcs = link_up(start, stop, used, tables, room)
    if hops == 0:
        return Cost(_seconds(blur * mean) + charge, FAR, 0.0, 0, 0.0)
    factor = 1.0
    if tables.max_hops > 0 and hops > tables.max_hops:
        factor *= np.exp(hop_price * (hops - tables.max_hops))
    if tables.max_latency_s >= 0.0 and latency_s > tables.max_latency_s:
        factor *= np.exp(10.0 * hop_price * (latency_s / max(tables.max_latency_s, 1e-9) - 1.0))
    fixed = charge + tables.latency_weight * latency_s
    if (smooth + tables.latency_weight * latency_s) * factor > above:
        return Cost(above * 1.5, FAR, 0.0, hops, latency_s)
    flow = max_flow(2 * count, 2 * count + 1, arcs, least, 1e-11 * tables.top, room)
    smooth = (_seconds((1.0 - blur) * flow + blur * mean) + fixed) * factor
    total_s = FAR if factor > 1.0 or flow <= 0.0 else 1.0 / flow + fixed
    return Cost(smooth, total_s, flow, hops, latency_s)


@compiled
def _seconds(tokens_per_s: float) -> float:
    return 1.0 / tokens_per_s if tokens_per_s > 1e-290 else FAR


@compiled
def sort_by_stop(start: Ints, stop: Ints, num_layers: int, room: Room) -> int:
    """Write the nodes that hold something into room.order by where they stop; how many."""
    place = room.place
    place[:] = 0
    used = 0
    for i in range(len(start)):
        if stop[i] > start[i]:
            place[stop[i]] += 1
            used += 1
    before = 0
    for layer in range(num_layers + 1):
        here = place[layer]
        place[layer] = before
        before += here
    for i in range(len(start)):
        if stop[i] > start[i]:
            room.order[place[stop[i]]] = i
            place[stop[i]] += 1
    return used


@compiled
def _arc(tail: int, head: int, capacity: float, arcs: int, room: Room) -> int:
    """Add an arc and its residual twin; how many arcs there are now."""
    room.head[arcs], room.left[arcs] = head, capacity
    room.following[arcs] = room.first[tail]
    room.first[tail] = arcs
    room.head[arcs + 1], room.left[arcs + 1] = tail, 0.0
    room.following[arcs + 1] = room.first[head]
    room.first[head] = arcs + 1
    return arcs + 2


@compiled
def link_up(
    start: Ints, stop: Ints, used: int, tables: Tables, room: Room
) -> tuple[int, float, int]:
    """Build the flow graph; nodes in the longest usable chain, latency of the slowest, arcs."""
    count = len(start)
    hops, late = room.hops, room.late
    room.first[:] = -1
    arcs, longest, slowest_s = 0, 0, 0.0
    for a in range(used):
        j = room.order[a]
        hops[j], late[j] = 0, 0.0
        if start[j] == 0 and tables.source[j] > 0.0:
            hops[j], late[j] = 1, stop[j] * tables.layer_s[j]
            arcs = _arc(2 * count, 2 * j, tables.source[j], arcs, room)
        for b in range(a - 1, -1, -1):
            i = room.order[b]
            if stop[i] < start[j]:
                break
            meets = stop[i] == start[j] or (tables.partial and stop[i] < stop[j])
            if not meets or hops[i] == 0 or tables.link[i, j] <= 0.0:
                continue
            hops[j] = max(hops[j], hops[i] + 1)
            step_s = tables.latency[i, j] + (stop[j] - stop[i]) * tables.layer_s[j]
            late[j] = max(late[j], late[i] + step_s)
            arcs = _arc(2 * i + 1, 2 * j, tables.link[i, j], arcs, room)
        if hops[j] == 0:
            continue
        arcs = _arc(2 * j, 2 * j + 1, tables.rate[j, stop[j] - start[j]], arcs, room)
        if stop[j] == tables.num_layers and tables.sink[j] > 0.0:
            arcs = _arc(2 * j + 1, 2 * count + 1, tables.sink[j], arcs, room)
            longest, slowest_s = max(longest, hops[j]), max(slowest_s, late[j])
    return longest, slowest_s, arcs


@compiled
def max_flow(source: int, sink: int, num_arcs: int, most: float, dust: float, room: Room) -> float:
    """The maximum flow; stops once it is `most`, which nothing can exceed.

    Source: Dinic 1970; real capacities, `dust` or less counts as full.
    """
    total = 0.0
    if num_arcs == 0:
        return total
    while total < most * (1.0 - 1e-13) and _find_levels(source, sink, dust, room):
        room.turn[:] = room.first
        depth, at = 0, source
        while True:
            if at == sink:
                amount = FAR
                for d in range(depth):
                    amount = min(amount, room.left[room.path[d]])
                total += amount
                back = 0
                for d in range(depth - 1, -1, -1):
                    arc = room.path[d]
                    room.left[arc] -= amount
                    room.left[arc ^ 1] += amount
                    if room.left[arc] <= dust:
                        back = d
                depth = back
                at = room.head[room.path[back] ^ 1]
                continue
            arc = room.turn[at]
            while arc >= 0 and not (
                room.left[arc] > dust and room.level[room.head[arc]] == room.level[at] + 1
            ):
                arc = room.following[arc]
            room.turn[at] = arc
            if arc >= 0:
                room.path[depth] = arc
                depth += 1
                at = room.head[arc]
            elif depth == 0:
                break
            else:
                room.level[at] = -1
                depth -= 1
                at = room.head[room.path[depth] ^ 1]
    return total


@compiled
def _find_levels(source: int, sink: int, dust: float, room: Room) -> bool:
    """Write the distance of every vertex from the source; whether the sink has one."""
    level, queue = room.level, room.queue
    level[:] = -1
    level[source], queue[0] = 0, source
    begin, end = 0, 1
    while begin < end:
        tail = queue[begin]
        begin += 1
        arc = room.first[tail]
        while arc >= 0:
            head = room.head[arc]
            if level[head] < 0 and room.left[arc] > dust:
                level[head] = level[tail] + 1
                if head == sink:
                    return True
                queue[end] = head
                end += 1
            arc = room.following[arc]
    return False
