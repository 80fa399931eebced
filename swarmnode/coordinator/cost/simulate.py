"""One training step, event by event: what the engine does, with everybody's numbers.

Every machine works on one unit at a time and picks it as the engine does (late stages first, a
backward before a forward, windows of S - s microbatches and those ahead). Frames leave a machine
one after the other at the rate of their link, arrive a latency later, and share the receiver's
downlink. Then shares, sums and reports. Plain Python on plain lists: about 2 us an event.
"""

from heapq import heappop, heappush

from swarmnode.coordinator.cost import step_formula as on
from swarmnode.coordinator.cost.step_formula import Tables
from swarmnode.coordinator.cost.training import grid_of, step_of
from swarmnode.coordinator.objective import Arrangement

WORK, FORWARD, BACKWARD, SHARE, SUM = range(5)
Event = tuple[float, int, int, int, int, int]
"""Time, number (so that equal times keep their order), kind, and three numbers of the kind's."""
Table = list[list[float]]


def simulate_step(arrangement: Arrangement, tables: Tables) -> float:
    """Predicted seconds of one step; infinite if a link that it needs is missing."""
    return Simulation(arrangement, tables).run()


class Simulation:
    """The state of one step while it happens."""

    def __init__(self, arrangement: Arrangement, tables: Tables) -> None:
        grid, counts = grid_of(arrangement)
        priced = step_of(grid, counts, tables)
        self.tables = tables
        self.grid: list[list[int]] = grid.tolist()
        self.num_stages, self.num_slots = grid.shape
        self.priced = priced
        self.events: list[Event] = []
        self.num_events = 0
        count = tables.flop_s.shape[0]
        # When each wire is free again: for boundary frames, and for gradients behind them.
        self.out_free_s = ([0.0] * count, [0.0] * count)
        self.in_free_s = ([0.0] * count, [0.0] * count)
        self.latency_s: Table = tables.latency_s.tolist()
        self.wires = {
            FORWARD: (tables.forward_out_s.tolist(), tables.forward_in_s.tolist()),
            BACKWARD: (tables.backward_out_s.tolist(), tables.backward_in_s.tolist()),
            SHARE: (tables.reduce_out_s.tolist(), tables.reduce_in_s.tolist()),
        }
        self.groups = _groups(self.grid, priced.stage, tables)
        self._place()

    def _place(self) -> None:
        """Lay out every slot's counters: arrived, forward done, backward done."""
        stages, slots, m = self.num_stages, self.num_slots, self.tables.num_microbatches
        flops, touched = self.priced.stage[on.FLOPS], self.priced.stage[on.TOUCHED]
        flop_s, touch_s = self.tables.flop_s, self.tables.touch_s
        self.hosted: dict[int, list[int]] = {}
        self.work_s: list[float] = []
        for s in range(stages):
            for v in range(slots):
                node = self.grid[s][v]
                self.work_s.append(float(max(flops[s] * flop_s[node], touched[s] * touch_s[node])))
                self.hosted.setdefault(node, []).insert(0, s * slots + v)
        self.activations = [m] * slots + [0] * (slots * (stages - 1))
        self.gradients = [0] * (slots * stages)
        self.num_forward = [0] * (slots * stages)
        self.num_backward = [0] * (slots * stages)
        self.is_busy = dict.fromkeys(self.hosted, False)

    def run(self) -> float:
        """Let everything happen; the seconds from the first Begin to the next."""
        if self.tables.num_microbatches < 1:
            return 0.0
        now_s = pipelines_s = 0.0
        for node in self.hosted:
            self._start(node, 0.0)
        while self.events:
            now_s, _, kind, a, b, c = heappop(self.events)
            if now_s == float("inf"):
                return now_s
            if kind == WORK:
                pipelines_s = now_s
                self._worked(now_s, a, b, c)
            elif kind == SHARE:
                self._shared(now_s, a, b)
            elif kind != SUM:
                arrived = self.activations if kind == FORWARD else self.gradients
                arrived[a] += 1
                self._start(b, now_s)
        exposed_s = now_s - pipelines_s
        if self.tables.staleness:
            exposed_s = max(0.0, exposed_s - pipelines_s)
        end_s = pipelines_s + exposed_s / self.tables.reduce_every
        apply_s = max(float(self.priced.machine[on.APPLY_S, n]) for n in self.hosted)
        return end_s + apply_s + max(float(self.tables.wait_s[n]) for n in self.hosted)

    def _start(self, node: int, now_s: float) -> None:
        """Begin the next unit of a machine that has one and does nothing."""
        if self.is_busy[node]:
            return
        slots, m = self.num_slots, self.tables.num_microbatches
        chosen = -1
        for slot in self.hosted[node]:
            forward, backward = self.num_forward[slot], self.num_backward[slot]
            if backward < forward and self.gradients[slot] > backward:
                share = self.tables.backward_share
                self.is_busy[node] = True
                self._at(now_s + share * self.work_s[slot], WORK, slot, node, BACKWARD)
                return
            if chosen < 0 and forward < m and forward - backward < self._depth(slot // slots):
                chosen = slot if self.activations[slot] > forward else -1
        if chosen >= 0:
            self.is_busy[node] = True
            share = 1.0 - self.tables.backward_share
            self._at(now_s + share * self.work_s[chosen], WORK, chosen, node, FORWARD)

    def _depth(self, stage: int) -> int:
        """How many microbatches of a slot may be in flight."""
        ahead = 0 if stage == self.num_stages - 1 else self.tables.ahead
        return int(self.num_stages) - stage + ahead

    def _worked(self, now_s: float, slot: int, node: int, direction: int) -> None:
        """A unit is done: its result goes on, the machine to its next unit."""
        slots = self.num_slots
        self.is_busy[node] = False
        if direction == FORWARD:
            self.num_forward[slot] += 1
            if slot // slots == self.num_stages - 1:
                self.gradients[slot] += 1
            else:
                self._send(now_s, node, FORWARD, slot + slots)
        else:
            self.num_backward[slot] += 1
            if slot >= slots:
                self._send(now_s, node, BACKWARD, slot - slots)
            if self.num_backward[slot] == self.tables.num_microbatches:
                self._share(now_s, slot, node)
        self._start(node, now_s)

    def _send(self, now_s: float, node: int, kind: int, slot: int) -> None:
        target = self.grid[slot // self.num_slots][slot % self.num_slots]
        if target == node:
            (self.activations if kind == FORWARD else self.gradients)[slot] += 1
            return  # the machine itself is about to look for work
        arrives_s = self._wire(now_s, node, target, kind, 1.0)
        self._at(arrives_s, kind, slot, target, 0)

    def _wire(self, now_s: float, source: int, target: int, kind: int, size: float) -> float:
        """When `size` frames are with `target` that leave `source` now or as soon as they can.

        Each peer has a stream of its own, so that a boundary frame does not wait behind megabytes
        of gradients: it goes past them, and they end later by as much.
        """
        out_s, in_s = self.wires[kind][0][source][target], self.wires[kind][1][source][target]
        is_bulk = kind == SHARE
        out_free_s, in_free_s = self.out_free_s[is_bulk], self.in_free_s[is_bulk]
        start_s = max(now_s, out_free_s[source])
        end_s = start_s + size * out_s
        latency_s = self.latency_s[source][target]
        first_s = max(start_s + latency_s, in_free_s[target])
        arrives_s: float = max(end_s + latency_s, first_s + size * in_s)
        out_free_s[source], in_free_s[target] = end_s, arrives_s
        if not is_bulk:
            bulk_s = self.out_free_s[True], self.in_free_s[True]
            bulk_s[0][source] = max(bulk_s[0][source] + size * out_s, end_s)
            bulk_s[1][target] = max(bulk_s[1][target] + size * in_s, arrives_s)
        return arrives_s

    def _share(self, now_s: float, slot: int, node: int) -> None:
        """A slot is finished: its share of every shard goes to the shard's owner.

        The engine's streams to all owners run side by side; to begin with another owner in each
        slot comes to the same time, where one order for all would crowd the first owner's wire.
        """
        for index, (slots, hosts, shard, waiting) in enumerate(self.groups):
            if slot not in slots:
                continue
            first = slots.index(slot) + 1
            for part in [*range(first, len(hosts)), *range(first)]:
                owner = hosts[part]
                if owner != node:
                    self._at(self._wire(now_s, node, owner, SHARE, shard), SHARE, index, part, 0)
                    continue
                waiting[part] -= 1
                if not waiting[part]:
                    self._sum(now_s, index, part)

    def _shared(self, now_s: float, index: int, part: int) -> None:
        waiting = self.groups[index][3]
        waiting[part] -= 1
        if not waiting[part]:
            self._sum(now_s, index, part)

    def _sum(self, now_s: float, index: int, part: int) -> None:
        """All shares of a shard are here: its owner sends the sum to every other machine."""
        _, hosts, shard, _ = self.groups[index]
        owner = hosts[part]
        for target in dict.fromkeys(hosts[part:] + hosts[:part]):
            if target != owner:
                self._at(self._wire(now_s, owner, target, SHARE, shard), SUM, 0, 0, 0)

    def _at(self, time_s: float, kind: int, a: int, b: int, c: int) -> None:
        self.num_events += 1
        heappush(self.events, (time_s, self.num_events, kind, a, b, c))


Group = tuple[list[int], list[int], float, list[int]]
"""Its slots, their hosts, the weights of one shard, and the shares that each shard waits for."""


def _groups(grid: list[list[int]], stage: on.Floats, tables: Tables) -> list[Group]:
    """The reduction groups: each stage's, and the one of a tied embedding."""
    num_stages, count = len(grid), len(grid[0])

    def group(rows: list[int], weights: float) -> Group:
        slots = [s * count + v for s in rows for v in range(count)]
        hosts = [grid[s][v] for s in rows for v in range(count)]
        return slots, hosts, weights / len(hosts), [len(hosts)] * len(hosts)

    groups = [group([s], float(stage[on.OWN_WEIGHTS, s])) for s in range(num_stages)]
    if tables.tied_weights > 0.0 and num_stages > 1:
        groups.append(group([0, num_stages - 1], tables.tied_weights))
    return groups
