"""A first arrangement for training, at once: keep live hosts, fill the rest one by one.

Plain numpy, no search and no compiling, so that a dead machine's slots have a host again within
milliseconds. Where filling fails on tight memory, `fits_somewhere` looks harder.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from swarmnode.coordinator.cost import step_formula as on
from swarmnode.coordinator.cost.needs import split_layers
from swarmnode.coordinator.cost.step_formula import Floats, Ints, Tables
from swarmnode.coordinator.cost.training import step_of
from swarmnode.coordinator.objective import NOBODY, Arrangement
from swarmnode.coordinator.solver.training.layers import min_max_split
from swarmnode.errors import CapacityError

Start = tuple[Ints, Ints]
"""Hosts (S, V) and numbers of layers (S,)."""


def first_start(
    tables: Tables, num_layers: int, stages: int, slots: int, previous: Arrangement | None
) -> Start | None:
    """Hosts and layers that fit, close to `previous`; None if no quick way leads to any."""
    if previous is not None and is_alike(previous, num_layers, stages, slots):
        counts = np.array([stop - start for start, stop in previous.layers], dtype=np.int64)
        found = _filled(np.array(previous.slots, dtype=np.int64), counts, tables)
        if found is not None:
            return found
    best: tuple[float, Start] | None = None
    empty = np.full((stages, slots), NOBODY, dtype=np.int64)
    for counts, tight in _cold_starts(tables, num_layers, stages, slots):
        for nodes in _groups_in_reach(tables):
            found = _filled(empty, counts, tables, nodes=nodes, tight=tight)
            if found is not None:
                cost = step_of(*found, tables).total_s
                if best is None or cost < best[0]:
                    best = cost, found
    return best[1] if best is not None else None


def is_alike(previous: Arrangement, num_layers: int, stages: int, slots: int) -> bool:
    """Whether `previous` is a grid of this shape over all layers."""
    rows = previous.slots
    covered = [layer for start, stop in previous.layers for layer in range(start, stop)]
    return (
        len(rows) == len(previous.layers) == stages
        and all(len(row) == slots for row in rows)
        and all(start < stop for start, stop in previous.layers)
        and covered == list(range(num_layers))
    )


def _cold_starts(
    tables: Tables, num_layers: int, stages: int, slots: int
) -> Iterator[tuple[Ints, bool]]:
    """Numbers of layers to try, and whether to pack tightly."""
    even = [stop - start for start, stop in split_layers(num_layers, stages)]
    by_memory = _split_by_memory(tables, num_layers, stages, slots)
    for tight in (False, True):
        yield np.array(even, dtype=np.int64), tight
        if by_memory is not None and list(by_memory) != even:
            yield np.array(by_memory, dtype=np.int64), tight


def _split_by_memory(
    tables: Tables, num_layers: int, stages: int, slots: int
) -> tuple[int, ...] | None:
    """A split for rows of machines of like memory, largest first; the last stage next to it."""
    count = len(tables.room_bytes)
    copies = -(-stages * slots // count)
    rooms = np.sort(np.repeat(tables.room_bytes / copies, copies))[::-1]
    row_rooms = rooms[: stages * slots].reshape(stages, slots)[:, -1]
    caps, one = [], np.ones(stages, dtype=np.int64)
    least, two = np.zeros((on.NUM_STAGE_ROWS, stages)), np.zeros((on.NUM_STAGE_ROWS, stages))
    on.fill_stages(one, tables, least)
    on.fill_stages(one * 2, tables, two)
    for s in range(stages):
        first = least[on.SLOT_BYTES, s] + least[on.STATE_BYTES, s]
        layer = two[on.SLOT_BYTES, s] + two[on.STATE_BYTES, s] - first
        spare = (row_rooms[s] - first) / max(layer, 1.0)
        caps.append(int(min(num_layers, 1 + np.floor(spare))) if spare >= 0 else 0)
    return min_max_split(num_layers, [1.0 / max(cap, 1) for cap in caps], [0.0] * stages, caps)


def _groups_in_reach(tables: Tables) -> list[NDArray[np.bool_]]:
    """Sets of machines to draw from (N,): all, then those that all reach each other."""
    is_linked = np.isfinite(tables.reduce_out_s) & np.isfinite(tables.reduce_out_s.T)
    count = len(is_linked)
    if is_linked.all():
        return [np.ones(count, dtype=np.bool_)]
    groups: list[NDArray[np.bool_]] = []
    left = np.ones(count, dtype=np.bool_)
    while left.any() and len(groups) < 8:
        seed = int(np.where(left, (is_linked & left).sum(axis=1), -1).argmax())
        group = np.zeros(count, dtype=np.bool_)
        for node in [seed, *np.argsort(tables.flop_s, kind="stable")]:
            if is_linked[node, seed] and is_linked[node][group].all():
                group[node] = True
        group[seed] = True
        groups.append(group)
        left &= ~group
    return [*groups, np.ones(count, dtype=np.bool_)]


def _filled(
    grid: Ints,
    counts: Ints,
    tables: Tables,
    *,
    nodes: NDArray[np.bool_] | None = None,
    tight: bool = False,
) -> Start | None:
    """Give every open slot the host that would be done soonest; None if one has no host.

    `tight`: the one that it fills best instead, to keep large machines for large stages.
    """
    filling = _Filling(grid.shape, counts, tables, nodes)
    stages, slots = grid.shape
    wanted = []
    for s in range(stages):
        for v in range(slots):
            if grid[s, v] != NOBODY and filling.able(s)[grid[s, v]]:
                filling.put(s, v, int(grid[s, v]))
            else:
                wanted.append((s, v))
    sizes = filling.stage[on.SLOT_BYTES] + filling.stage[on.STATE_BYTES]
    for s, v in sorted(wanted, key=lambda at: (-sizes[at[0]], at)):
        able = filling.able(s)
        scores = filling.left_bytes(s) if tight else filling.soonest_s(s, v)
        scores = np.where(able & np.isfinite(filling.soonest_s(s, v)), scores, np.inf)
        idle = np.where(filling.holds.any(axis=1), np.inf, scores)
        if filling.num_hosts < tables.min_nodes and np.isfinite(idle).any():
            scores = idle
        node = int(scores.argmin())
        if not np.isfinite(scores[node]):
            return None
        filling.put(s, v, node)
    found = filling.grid, counts
    return found if np.isfinite(step_of(*found, tables).total_s) else None


class _Filling:
    """A grid while it is filled: what each machine holds and does by now."""

    def __init__(
        self,
        shape: Sequence[int],
        counts: Ints,
        tables: Tables,
        nodes: NDArray[np.bool_] | None,
    ) -> None:
        count = len(tables.flop_s)
        self.tables = tables
        self.grid = np.full(shape, NOBODY, dtype=np.int64)
        self.stage = np.zeros((on.NUM_STAGE_ROWS, shape[0]))
        on.fill_stages(counts, tables, self.stage)
        self.work_s = np.maximum(
            np.outer(tables.flop_s, self.stage[on.FLOPS]),
            np.outer(tables.touch_s, self.stage[on.TOUCHED]),
        )
        self.used = np.zeros(count)
        self.load_s = np.zeros(count)
        self.holds = np.zeros((count, shape[0]), dtype=np.bool_)
        self.allowed = tables.is_allowed if nodes is None else tables.is_allowed & nodes[:, None]

    @property
    def num_hosts(self) -> int:
        return int(self.holds.any(axis=1).sum())

    def left_bytes(self, s: int) -> Floats:
        """What each machine has left with one more slot of stage `s`."""
        state = np.where(self.holds[:, s], 0.0, self.stage[on.STATE_BYTES, s])
        left = self.tables.room_bytes - self.used - state - self.stage[on.SLOT_BYTES, s]
        return np.asarray(left, dtype=np.float64)

    def able(self, s: int) -> NDArray[np.bool_]:
        return np.asarray(self.allowed[:, s] & (self.left_bytes(s) >= 0.0))

    def soonest_s(self, s: int, v: int) -> Floats:
        """Seconds of a step that each machine would need, with this slot and its frames."""
        tables, grid = self.tables, self.grid
        seconds = tables.num_microbatches * (self.load_s + self.work_s[:, s])
        for other in (s - 1, s + 1):
            if 0 <= other < len(grid) and grid[other, v] != NOBODY:
                near = grid[other, v]
                frames = tables.forward_out_s[:, near] + tables.backward_out_s[near, :]
                trip = tables.latency_s[:, near] + tables.latency_s[near, :]
                seconds = seconds + tables.num_microbatches * frames + trip
        shard = self.stage[on.OWN_WEIGHTS, s] / grid.shape[1]
        for near in grid[s][grid[s] != NOBODY]:
            seconds = seconds + 2.0 * shard * tables.reduce_out_s[:, near]
        return np.asarray(seconds, dtype=np.float64)

    def put(self, s: int, v: int, node: int) -> None:
        self.used[node] = self.tables.room_bytes[node] - self.left_bytes(s)[node]
        self.load_s[node] += self.work_s[node, s]
        self.holds[node, s] = True
        self.grid[s, v] = node


def cannot_fit(tables: Tables, num_layers: int, slots: int) -> bool:
    """Whether memory is short whatever goes where: all layers and slots, over all machines."""
    layer = float(tables.per_layer[3]) * (tables.per_weight[0] + slots * tables.per_weight[1])
    layer += slots * float(tables.per_layer[2])  # of one microbatch in flight, at least
    one = float(tables.per_layer[3]) * (tables.per_weight[0] + tables.per_weight[1])
    num_able = int((tables.room_bytes >= one + tables.per_layer[2]).sum())
    is_open = bool(tables.is_allowed.any(axis=0).all())
    return not is_open or num_able == 0 or num_layers * layer > float(tables.room_bytes.sum())


def capacity_error(tables: Tables, num_layers: int, stages: int, slots: int) -> CapacityError:
    """What is missing, in one line."""
    counts = np.array([stop - start for start, stop in split_layers(num_layers, stages)])
    stage = np.zeros((on.NUM_STAGE_ROWS, stages))
    on.fill_stages(counts, tables, stage)
    one = stage[on.SLOT_BYTES] + stage[on.STATE_BYTES]
    all_slots = float((stage[on.SLOT_BYTES] * slots + stage[on.STATE_BYTES]).sum())
    rooms = tables.room_bytes
    grid = f"{stages} stages x {slots} slots"
    if not tables.is_allowed.any(axis=0).all():
        alone = int((~tables.is_allowed.any(axis=0)).argmax())
        return CapacityError(f"every node is pinned away from stage {alone}; remove a pin")
    gib = 2.0**30
    if cannot_fit(tables, num_layers, slots) or one.min() > rooms.max():
        return CapacityError(
            f"{grid} need {all_slots / gib:.2f} GiB in all and {one.min() / gib:.2f} GiB on one "
            f"node; {len(rooms)} nodes have {rooms.sum() / gib:.2f} GiB (largest: "
            f"{rooms.max() / gib:.2f} GiB); add nodes, change placement.stages or lower batch.rows"
        )
    return CapacityError(
        f"{grid} fit nowhere: a slot needs {one.min() / gib:.2f} to {one.max() / gib:.2f} GiB, "
        f"{len(rooms)} nodes have at most {rooms.max() / gib:.2f} GiB each, and slots that talk "
        "need a link both ways; add nodes or links, change placement.stages or lower batch.rows"
    )
