"""Which worker holds all others up: it computes far longer than it used to, while they wait."""

from collections import defaultdict, deque
from collections.abc import Collection
from statistics import median

from swarmnode.domain import PeerId

LATE = 4.0
"""A step, and what a worker computes in it, are late after so many times what is usual."""
LATE_S = 10.0
"""No step is late before this."""
LEAST_COMPUTE_S = 5.0
"""Workers speak of a step in the middle of it once they have computed for so long."""
OTHERS = 2.0
"""Where another worker too takes so many times longer than usual, nobody alone is to blame."""
LEAST_STEPS = 3
"""Committed in a generation before anything counts as usual."""
MOST_STEPS = 20
AGAIN_S = 600.0
"""A worker that had to go is not held to be late again for so long: it may be needed."""


class Stragglers:
    """What each worker computes in a step of the generation at hand. Pure."""

    def __init__(self) -> None:
        self._began_s: float | None = None
        self._computed: defaultdict[PeerId, float] = defaultdict(float)
        """Seconds, in the running step."""
        self._usual: dict[PeerId, deque[float]] = {}
        self._steps_s: deque[float] = deque(maxlen=MOST_STEPS)
        self._sent_away_s: dict[PeerId, float] = {}

    def placed(self) -> None:
        """Another generation: who does what has changed, so nothing is usual yet."""
        self._began_s = None
        self._computed.clear()
        self._usual.clear()
        self._steps_s.clear()

    def begins(self, now_s: float) -> None:
        """A step of training begins."""
        self._began_s = now_s
        self._computed.clear()

    def computed(self, peer: PeerId, seconds: float) -> None:
        """A worker has computed for so long since it said so last."""
        self._computed[peer] += seconds

    def committed(self, now_s: float) -> None:
        """The running step is over."""
        if self._began_s is None:
            return
        self._steps_s.append(now_s - self._began_s)
        for peer, seconds in self._computed.items():
            self._usual.setdefault(peer, deque(maxlen=MOST_STEPS)).append(seconds)
        self._began_s = None

    def find(self, workers: Collection[PeerId], now_s: float) -> PeerId | None:
        """The one of `workers` because of which the running step is late, if it is one alone."""
        if self._began_s is None or len(self._steps_s) < LEAST_STEPS:
            return None
        if now_s - self._began_s <= max(LATE_S, LATE * median(self._steps_s)):
            return None
        slow = [peer for peer in workers if self._exceeds(peer, OTHERS)]
        if len(slow) != 1 or not self._exceeds(slow[0], LATE):
            return None
        is_again = now_s - self._sent_away_s.get(slow[0], -AGAIN_S) < AGAIN_S
        return None if is_again else slow[0]

    def sent_away(self, peer: PeerId, now_s: float) -> None:
        """Its slots begin the step again elsewhere."""
        self._sent_away_s[peer] = now_s

    def _exceeds(self, peer: PeerId, times: float) -> bool:
        usual, computed_s = self._usual.get(peer), self._computed[peer]
        return bool(usual) and computed_s > max(LEAST_COMPUTE_S, times * median(usual or ()))
