"""Maximum flow in a directed graph with real capacities, its least cut, and its paths."""

from collections import deque
from collections.abc import Iterator

RELATIVE_DUST = 1e-12
"""Capacity left below this share of the largest arc counts as none: it is rounding."""


class FlowGraph:
    """Arcs are added in pairs: arc `e` and its residual twin `e ^ 1`."""

    def __init__(self, num_vertices: int) -> None:
        self.arcs_of: list[list[int]] = [[] for _ in range(num_vertices)]
        self.head: list[int] = []
        self.left: list[float] = []
        self.capacity: list[float] = []

    def add_arc(self, tail: int, head: int, capacity: float) -> None:
        """Let up to `capacity` (finite, at least 0) flow from `tail` to `head`."""
        for begin, end, room in ((tail, head, capacity), (head, tail, 0.0)):
            self.arcs_of[begin].append(len(self.head))
            self.head.append(end)
            self.left.append(room)
            self.capacity.append(room)

    def solve(self, source: int, sink: int) -> float:
        """The largest flow from `source` to `sink`; leaves it on the arcs.

        Source: Dinic 1970 (shortest augmenting paths, one level graph at a time).
        """
        total = 0.0
        while True:
            level = self._levels(source)
            if level[sink] < 0:
                return total
            total += self._blocking(source, sink, level)

    def reachable(self, source: int) -> set[int]:
        """The source side of a least cut, once solved."""
        return {v for v, level in enumerate(self._levels(source)) if level >= 0}

    def paths(self, source: int, sink: int) -> Iterator[tuple[tuple[int, ...], float]]:
        """The flow as paths of vertices, each with its amount. The graph must have no cycle."""
        flow = [max(0.0, c - x) for c, x in zip(self.capacity, self.left, strict=True)]
        dust = self._dust() * 10
        while True:
            path, arcs = [source], list[int]()
            while path[-1] != sink:
                arc = max(self.arcs_of[path[-1]], key=lambda e: (flow[e], -e), default=-1)
                if arc < 0 or flow[arc] <= dust:
                    break
                path.append(self.head[arc])
                arcs.append(arc)
            amount = min((flow[e] for e in arcs), default=0.0)
            if amount <= dust:
                return
            for arc in arcs:
                flow[arc] -= amount
            if path[-1] == sink:
                yield tuple(path), amount

    def _dust(self) -> float:
        return RELATIVE_DUST * max(self.capacity, default=0.0)

    def _levels(self, source: int) -> list[int]:
        level, dust = [-1] * len(self.arcs_of), self._dust()
        level[source] = 0
        queue = deque([source])
        while queue:
            tail = queue.popleft()
            for arc in self.arcs_of[tail]:
                if self.left[arc] > dust and level[self.head[arc]] < 0:
                    level[self.head[arc]] = level[tail] + 1
                    queue.append(self.head[arc])
        return level

    def _blocking(self, source: int, sink: int, level: list[int]) -> float:
        """Fill every path that goes one level down with each arc."""
        total, dust = 0.0, self._dust()
        turn = [0] * len(self.arcs_of)
        path: list[int] = []
        while True:
            tail = self.head[path[-1]] if path else source
            if tail == sink:
                amount = min(self.left[e] for e in path)
                for arc in path:
                    self.left[arc] -= amount
                    self.left[arc ^ 1] += amount
                total += amount
                path = []
                continue
            arc = self._step(tail, level, turn, dust)
            if arc >= 0:
                path.append(arc)
            elif not path:
                return total
            else:
                level[tail] = -1
                path.pop()

    def _step(self, tail: int, level: list[int], turn: list[int], dust: float) -> int:
        arcs = self.arcs_of[tail]
        while turn[tail] < len(arcs):
            arc = arcs[turn[tail]]
            if self.left[arc] > dust and level[self.head[arc]] == level[tail] + 1:
                return arc
            turn[tail] += 1
        return -1
