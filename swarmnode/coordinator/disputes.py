"""Holders of a stage that hold different weights after the same step: who is the odd one out."""

from collections import Counter
from collections.abc import Mapping

from swarmnode.domain import PeerId
from swarmnode.messages import Applied

MAX_TIMES = 2
"""Who is the odd one so often computes other bits than its partners, and does no more for the job
until it has been started again: a device of another kind, or a broken one."""


class Disputes:
    """Hashes of weights, as the holders of a generation tell them after each step. Pure.

    Who is right, only the log can tell; where it does not reach back far enough, most are.
    """

    def __init__(self) -> None:
        self._said: dict[tuple[int, int], dict[PeerId, str]] = {}
        """(step, stage) -> the hash that each holder told, in the order of telling."""
        self._odd: dict[int, frozenset[PeerId]] = {}
        self._times: Counter[PeerId] = Counter()

    @property
    def odd(self) -> Mapping[int, frozenset[PeerId]]:
        """stage -> holders that differ from most, while the stage's states are not one again. Where
        as many say one thing as another, the first to speak counts."""
        return dict(self._odd)

    def applied(self, peer: PeerId, applied: Applied) -> PeerId | None:
        """Take a hash; somebody who told another one before, if anybody did."""
        said = self._said.setdefault((applied.step, applied.stage), {})
        said[peer] = applied.state_hash
        for old in [known for known in self._said if known[0] < applied.step - 2]:
            del self._said[old]
        others = [other for other, told in said.items() if told != applied.state_hash]
        if not others:
            return None
        counts = Counter(said.values())
        usual = max(counts, key=counts.__getitem__)
        self._odd[applied.stage] = frozenset(p for p, told in said.items() if told != usual)
        return others[0]

    def assigned(self) -> None:
        """Another generation: what holders told in the last one is no longer compared."""
        self._said.clear()

    def settled(self) -> list[PeerId]:
        """All holders have got the states that count; who was the odd one too often by now."""
        self._times.update(peer for peers in self._odd.values() for peer in peers)
        self._odd.clear()
        found = sorted(peer for peer, times in self._times.items() if times >= MAX_TIMES)
        for peer in found:
            del self._times[peer]
        return found
