"""Who could have answered whom, and when: which holders of a stage P1 counts as survivors."""

import math
from collections import defaultdict

from swarmnode.coordinator.forming import SEARCH_S

FOUND_S = 12.0
"""Whoever can answer for so long is asked meanwhile, as who did not answer is asked again after
10 s; and then it answers, or says that it reads its disk."""
LATE_S = 4.0
"""Who was there for no longer than that since the search began may not have been asked before it
was gone again."""
NUM_MOMENTS = int(SEARCH_S - LATE_S)
Trouble = tuple[str, str]
"""A machine and one of `AILMENTS`; or the ends of a way on which nothing arrives."""
AILMENTS = ("down", "frozen", "full", "rotten")
"""Why a machine cannot say what is on its disk, promise anything, or keep what it says."""


class Presence:
    """What stood between two machines, and from when to when."""

    def __init__(self) -> None:
        self._spans: dict[Trouble, list[tuple[float, float]]] = defaultdict(list)

    def begins(self, trouble: Trouble, now_s: float) -> None:
        if not self._lasts(trouble):
            self._spans[trouble].append((now_s, math.inf))

    def ends(self, trouble: Trouble, now_s: float) -> None:
        if self._lasts(trouble):
            since_s, _ = self._spans[trouble].pop()
            self._spans[trouble].append((since_s, now_s))

    def moments(self, who: str, peer: str, now_s: float) -> set[int]:
        """When `who` must have known what is on the disk of `peer`, in whole seconds before now, as
        far back as a stage is looked for: both could talk to each other for `FOUND_S`."""
        troubles = [(who, peer), (peer, who)]
        troubles += [(name, kind) for name in (who, peer) for kind in AILMENTS]
        spans = [span for trouble in troubles for span in self._spans[trouble]]
        return {
            ago_s
            for ago_s in range(NUM_MOMENTS)
            if all(
                end_s <= now_s - ago_s - FOUND_S or now_s - ago_s < begin_s
                for begin_s, end_s in spans
            )
        }

    def _lasts(self, trouble: Trouble) -> bool:
        spans = self._spans[trouble]
        return bool(spans) and spans[-1][1] == math.inf
