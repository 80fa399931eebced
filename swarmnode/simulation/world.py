"""Virtual time: a seeded heap of events, and processes that die, freeze and thaw.

Everything that happens in a simulation is an event of one heap, ordered by time, then by when it
was scheduled; every choice comes from one `random.Random`. Equal seeds give equal runs.
"""

import heapq
from collections import deque
from collections.abc import Callable, Generator
from random import Random
from typing import Any

Action = Callable[..., object]
Script = Generator[float, None, None]
"""Code of a process that waits: it yields the seconds after which it wants to go on."""

MAX_TRACE = 4000


class Process:
    """One life of a program: what is to happen to it ends with it, and waits while it is frozen."""

    __slots__ = ("alive", "backlog", "freezes", "frozen", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.frozen = False
        self.freezes = 0
        """How often it was frozen; tells one freeze from the next."""
        self.backlog: list[tuple[Action, tuple[Any, ...]]] = []


class World:
    """The clock, the events to come, and chance."""

    def __init__(self, seed: int, *, keep_trace: bool = False) -> None:
        self.random = Random(seed)  # noqa: S311 - a simulation must repeat, not surprise
        self.now_s = 0.0
        self.num_events = 0
        self._heap: list[tuple[float, int, Process | None, Action, tuple[Any, ...]]] = []
        self._sequence = 0
        self._keeps_trace = keep_trace
        self.trace: deque[str] = deque(maxlen=MAX_TRACE)
        """What was told, the newest last; empty unless it is kept."""

    @property
    def keeps_trace(self) -> bool:
        return self._keeps_trace

    def tell(self, who: str, text: str) -> None:
        """Note something for whoever reads the trace of this run."""
        if self._keeps_trace:
            self.trace.append(f"{self.now_s:10.4f}  {who:<6} {text}")

    def after(
        self, delay_s: float, process: Process | None, action: Action, *arguments: Any
    ) -> None:
        """Call `action` after `delay_s`, if `process` lives then; None is the world itself."""
        self._sequence += 1
        event = (self.now_s + delay_s, self._sequence, process, action, arguments)
        heapq.heappush(self._heap, event)

    def start(self, process: Process, script: Script) -> None:
        """Run a script of `process`, up to its first wait at once."""
        wait_s = next(script, None)
        if wait_s is not None:
            self.after(wait_s, process, self.start, process, script)

    def kill(self, process: Process) -> None:
        """The process is gone, with everything that was scheduled for it."""
        process.alive = False
        process.backlog.clear()

    def freeze(self, process: Process) -> None:
        """The process does nothing until it thaws; what happens to it waits."""
        process.frozen = True
        process.freezes += 1

    def thaw(self, process: Process) -> None:
        """Everything that waited happens now, in its order."""
        process.frozen = False
        backlog, process.backlog = process.backlog, []
        for action, arguments in backlog:
            self.after(0.0, process, action, *arguments)

    def step(self) -> bool:
        """Let the next event happen; False if there is none."""
        if not self._heap:
            return False
        self.now_s, _, process, action, arguments = heapq.heappop(self._heap)
        if process is not None:
            if not process.alive:
                return True
            if process.frozen:
                process.backlog.append((action, arguments))
                return True
        self.num_events += 1
        action(*arguments)
        return True

    def exponential_s(self, mean_s: float) -> float:
        """A random span of time with this mean, at most ten times as long."""
        return min(self.random.expovariate(1.0 / mean_s), 10.0 * mean_s)
