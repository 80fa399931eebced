"""Who may put bytes on a line next: what is more urgent goes first, on all lines of a node.

A node's lines mostly share one uplink, so what goes to one peer takes room from what goes to
another. A message that is less urgent than one under way therefore waits between its records: for
a bounded time each, so that it keeps a small share, and not for a line that hangs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from swarmnode.p2p.ports import Urgency

HANGING_S = 2.0
"""A message of which nothing has left for so long holds nobody up."""
YIELD_RATIO = 8.0
"""A record waits at most this many times as long as it takes on its line: it keeps a ninth."""


class Turn:
    """One message that is being sent. Made by `Turns.taking`."""

    def __init__(self, turns: "Turns", urgency: Urgency, now_s: float) -> None:
        self.urgency = urgency
        self.moved_s = now_s
        self._turns = turns

    def moved(self) -> None:
        """Note that a part of the message has left."""
        self.moved_s = self._turns.now_s()

    async def wait(self, most_s: float) -> None:
        """Return once nothing more urgent is under way, or after `most_s`."""
        await self._turns.wait(self, most_s)


class Turns:
    """All messages that one node is sending. Trio side only."""

    def __init__(self, now_s: Callable[[], float] = trio.current_time) -> None:
        self.now_s = now_s
        self._under_way: list[Turn] = []
        self._changed = trio.Event()

    @contextmanager
    def taking(self, urgency: Urgency) -> Iterator[Turn]:
        """A message is under way for as long as the block lasts."""
        turn = Turn(self, urgency, self.now_s())
        self._under_way.append(turn)
        try:
            yield turn
        finally:
            self._under_way.remove(turn)
            self._changed.set()
            self._changed = trio.Event()

    async def wait(self, turn: Turn, most_s: float) -> None:
        """See `Turn.wait`."""
        if not self._is_behind(turn):
            return
        with trio.move_on_after(most_s):
            while self._is_behind(turn):
                await self._changed.wait()

    def _is_behind(self, turn: Turn) -> bool:
        since_s = self.now_s() - HANGING_S
        return any(
            other.urgency < turn.urgency and other.moved_s >= since_s for other in self._under_way
        )
