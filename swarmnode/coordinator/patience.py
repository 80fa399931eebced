"""How long a job waits for what, and how often it forgives."""

import math
from collections import Counter
from collections.abc import Iterable, Set

from swarmnode.domain import PeerId

LINK_GRACE_S = 2.0
"""A broken link between workers waits this long for one of its ends to be found dead."""
PATIENCE_S = {"placing": 900.0, "training": 120.0, "evaluating": 120.0}
"""A generation without progress for this long in a phase is given up and begun again."""
GATHER_PATIENCE_S = 60.0
"""A holder that does not publish its state for this long is asked again, or another one."""
ASK_AGAIN_S = 1.0
"""A question that a majority refused is put again, with a higher generation, after so long."""
SECOND_HOLDER_S = 5.0
"""Between two looks for somebody who can hold a stage besides its only holder."""
MAX_YIELD = 8
"""How many times longer a candidate waits at most, for each place that it is from the first."""
MAX_STRIKES = 2
"""The job fails when everybody who is here has failed this often since it last did its part."""
MAX_FAILURES = 5
"""Restarts in a row, without a commit between them, that end the job."""


def seconds(phase: str, *, is_gathering: bool) -> float:
    """How long a job may stay in `phase` without any progress."""
    return GATHER_PATIENCE_S if is_gathering else PATIENCE_S.get(phase, math.inf)


def silent(workers: Iterable[PeerId], placed: Set[PeerId]) -> list[PeerId]:
    """Who never took its part although others did; where nobody did, it is nobody's fault."""
    return sorted(set(workers) - placed) if placed else []


class BrokenLinks:
    """Links between workers of which at least one end is still alive."""

    def __init__(self) -> None:
        self._since_s: float | None = None
        self._ends: Counter[PeerId] = Counter()

    def add(self, peer: PeerId, other: PeerId, now_s: float) -> None:
        """`peer` says that its stream to `other` broke."""
        self._ends.update((peer, other))
        if self._since_s is None:
            self._since_s = now_s

    def are_due(self, now_s: float) -> bool:
        """Whether neither end was found dead meanwhile."""
        return self._since_s is not None and now_s - self._since_s >= LINK_GRACE_S

    def begun_again(self) -> None:
        """A new generation gives every link another chance."""
        self._since_s = None

    def clear(self) -> None:
        """A step was committed: all links work."""
        self._ends.clear()
        self._since_s = None

    def worst(self, me: PeerId) -> PeerId | None:
        """The end that was named most often if more than once since the last commit; not `me`
        if another will do."""
        if not self._ends:
            return None
        peer = max(self._ends, key=lambda p: (self._ends[p], p != me, p))
        return peer if self._ends[peer] > 1 else None
