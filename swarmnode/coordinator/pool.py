"""The peers that a job may use: alive, and not under suspicion after a loss."""

import math
from collections import Counter
from collections.abc import Sequence, Set
from typing import NamedTuple

from swarmnode.domain import Advert, PeerId

COOL_DOWN_S = 5.0
"""A lost peer is not given work for this long, whatever its advert says; long enough for an
advert from before the loss to arrive. Doubles with each strike."""
MAX_COOL_DOWN_S = 600.0


class _Bar(NamedTuple):
    """Why a lost peer gets no work, and until when."""

    until_s: float
    advert_end_s: float
    """Of the newest advert that was known when it had cooled down: only a later one counts."""
    incarnation: float
    """The daemon's life that ended: a later one is not barred. Infinite: every one is."""

    def allows(self, advert: Advert, now_s: float) -> bool:
        if advert.incarnation > self.incarnation:
            return True
        return now_s >= self.until_s and advert.expires_at_s > self.advert_end_s


class Pool:
    """Who is here. A lost peer comes back with an advert that it renewed after the loss; at once
    if it was started again, unless it has done nothing since it was lost before."""

    def __init__(self) -> None:
        self._alive: dict[PeerId, Advert] = {}
        self._barred: dict[PeerId, _Bar] = {}
        self._strikes: dict[PeerId, int] = {}
        self._failures: Counter[PeerId] = Counter()
        self._excluded: dict[PeerId, int | None] = {}
        """peer -> the incarnation that does no good here; None while it is not known."""
        self._leaving: dict[PeerId, int] = {}
        """peer -> the incarnation that said it will go."""

    def see(self, peers: Sequence[Advert], now_s: float) -> None:
        """Take over what the directory says."""
        self._alive = {advert.peer: advert for advert in peers}
        for peer, bar in self._barred.items():
            if now_s < bar.until_s and peer in self._alive:
                self._barred[peer] = bar._replace(advert_end_s=self._alive[peer].expires_at_s)
        for peer in [peer for peer, life in self._excluded.items() if life is None]:
            self.exclude(peer)

    def bar(self, peer: PeerId, now_s: float) -> None:
        """The peer is lost, or failed: no work for a while, and longer each time."""
        advert = self._alive.get(peer)
        strikes = self._strikes.get(peer, 0)
        self._strikes[peer] = strikes + 1
        pause_s = min(MAX_COOL_DOWN_S, COOL_DOWN_S * 2.0 ** min(strikes, 10))
        self._barred[peer] = _Bar(
            now_s + pause_s,
            advert.expires_at_s if advert else -math.inf,
            advert.incarnation if advert and not strikes else math.inf,
        )

    def failed(self, peer: PeerId, now_s: float, *, child_ended: bool = False) -> None:
        """The peer is here and cannot do its part; the first time that only its child has ended,
        it may try again at once."""
        self._failures[peer] += 1
        if not child_ended or self._failures[peer] > 1:
            self.bar(peer, now_s)

    def exclude(self, peer: PeerId) -> None:
        """This life of the peer does no good here: no work until it has been started again."""
        advert = self._alive.get(peer)
        self._excluded[peer] = advert.incarnation if advert is not None else None

    def leave(self, peer: PeerId, incarnation: int) -> None:
        """This life of the peer will end: no work for it until it has been started again."""
        self._leaving[peer] = incarnation

    def leaves(self, peer: PeerId) -> bool:
        """Whether the peer has said that it will go, and was not started again since."""
        incarnation = self._leaving.get(peer)
        advert = self._alive.get(peer)
        return incarnation is not None and (advert is None or advert.incarnation == incarnation)

    @property
    def leavers(self) -> list[PeerId]:
        """Everybody who will go, by id."""
        return sorted(filter(self.leaves, self._leaving))

    def forgive(self, peers: Sequence[PeerId]) -> None:
        """These did their part of a step: their strikes are forgotten."""
        for peer in peers:
            self._strikes.pop(peer, None)
            self._failures.pop(peer, None)

    def is_hopeless(self, num_strikes: int, workers: Set[PeerId]) -> bool:
        """Whether everybody who is alive has failed at least so often, and the plan's `workers`
        too: a node that sees nobody, as its wall clock is wrong, must not judge by itself alone."""
        return bool(self._alive) and all(
            self._failures[peer] >= num_strikes for peer in {*self._alive, *workers}
        )

    def is_here(self, peer: PeerId) -> bool:
        """Whether the directory knows the peer."""
        return peer in self._alive

    def usable(self, now_s: float) -> tuple[Advert, ...]:
        """Peers that may be given work, by id."""
        return tuple(
            advert
            for peer, advert in sorted(self._alive.items())
            if not self.leaves(peer)
            and self._excluded.get(peer) != advert.incarnation
            and (peer not in self._barred or self._barred[peer].allows(advert, now_s))
        )

    def addresses(self, peers: Sequence[PeerId]) -> dict[PeerId, tuple[str, ...]]:
        """Where those of `peers` that are known are reached."""
        return {p: self._alive[p].addresses for p in peers if p in self._alive}
