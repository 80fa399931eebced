"""Who is here: a pure machine that is fed with records and decides who is alive, by leases.

A peer is alive until its newest advert ends, or until `lease_s` after we last heard from it over
a stream, whichever is later. All times are wall clock, seconds since 1970.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

from swarmnode.domain import Advert, PeerId
from swarmnode.p2p.adverts import (
    CLOCK_SLACK_S,
    MAX_LEASE_S,
    BadAdvertError,
    authenticate,
    check_lease,
)

MAX_PEERS = 4096
"""So many peers are known at once, and so many records come of one look into the directory."""
PIECE = 64
"""Records that may be verified in one go: 12 ms."""


@dataclass(frozen=True)
class Records:
    """What the directory holds now, by subkey: the peer that each record claims to be of."""

    records: Mapping[str, bytes]
    partners: AbstractSet[str] = frozenset()
    """Peers that are known even where strangers fill all places: who is in a job of ours."""

    def pieces(self) -> "Iterator[Records]":
        """The same in turn, PIECE records at a time; one without any where there are none."""
        found = list(self.records.items())
        for start in range(0, max(1, len(found)), PIECE):
            yield Records(dict(found[start : start + PIECE]), self.partners)


@dataclass(frozen=True)
class Heard:
    """A stream brought something from this peer: it lives, whatever the directory says."""

    peer: PeerId


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class Joined:
    """A peer that was not here before."""

    advert: Advert


@dataclass(frozen=True)
class Changed:
    """A peer came back in a new life, or says something else about itself than before."""

    advert: Advert


@dataclass(frozen=True)
class Lost:
    """A lease ran out."""

    peer: PeerId


@dataclass(frozen=True)
class _Member:
    advert: Advert
    until_s: float


class Decode(Protocol):
    """Makes an advert of a record. Raises: BadAdvertError."""

    def __call__(self, record: bytes, now_s: float, *, owner: str | None) -> Advert: ...


class Membership:
    """Who is alive, with the newest advert of each; bad records are dropped and counted."""

    def __init__(
        self, *, lease_s: float, max_peers: int = MAX_PEERS, decode: Decode | None = None
    ) -> None:
        """Without `decode` records are adverts as adverts.py writes them."""
        self._lease_s = lease_s
        self._max_peers = max_peers
        self._decode = decode or _decode_once(2 * max_peers)
        self._members: dict[PeerId, _Member] = {}
        self._former: dict[PeerId, tuple[int, float]] = {}
        """Incarnation of a lost peer, kept until all records of its earlier lives have ended."""
        self._dropped: Counter[str] = Counter()

    @property
    def dropped(self) -> Mapping[str, int]:
        """Records dropped so far by reason: those of BadAdvertError, "stale" and "full"."""
        return dict(self._dropped)

    def peers(self, now_s: float) -> tuple[Advert, ...]:
        """The adverts of all who are alive at `now_s`, by peer id."""
        return tuple(
            member.advert for _, member in sorted(self._members.items()) if member.until_s > now_s
        )

    def handle(self, event: Records | Heard | Tick, now_s: float) -> list[Joined | Changed | Lost]:
        """Take one event in; the effects come losses first, then by peer id."""
        effects: list[Joined | Changed | Lost] = [*self._expire(now_s)]
        match event:
            case Records(records, partners):
                for subkey, record in sorted(records.items()):
                    if subkey in self._members or subkey in partners or not self._is_full:
                        effects += self._take(subkey, record, now_s)
                    else:  # before it costs a signature
                        self._dropped["full"] += 1
            case Heard(peer):
                member = self._members.get(peer)
                if member is not None:
                    until_s = max(member.until_s, now_s + self._lease_s)
                    self._members[peer] = replace(member, until_s=until_s)
            case Tick():
                pass
        return effects

    @property
    def _is_full(self) -> bool:
        return len(self._members) >= self._max_peers

    def _expire(self, now_s: float) -> list[Lost]:
        for peer in [p for p, (_, until_s) in self._former.items() if until_s <= now_s]:
            del self._former[peer]
        lost = sorted(p for p, member in self._members.items() if member.until_s <= now_s)
        for peer in lost:
            incarnation = self._members.pop(peer).advert.incarnation
            self._former[peer] = (incarnation, now_s + MAX_LEASE_S + CLOCK_SLACK_S)
        for peer in list(self._former)[: -self._max_peers]:  # the first to be lost, of a flood
            del self._former[peer]
        return [Lost(peer) for peer in lost]

    def _take(self, subkey: str, record: bytes, now_s: float) -> list[Joined | Changed]:
        try:
            advert = self._decode(record, now_s, owner=subkey)
        except BadAdvertError as error:
            self._dropped[error.reason] += 1
            return []
        before = self._members.get(advert.peer)
        floor = before.advert.incarnation if before else self._former.get(advert.peer, (0, 0))[0]
        if advert.incarnation < floor:
            self._dropped["stale"] += 1
            return []
        if before is None:
            self._former.pop(advert.peer, None)
            self._members[advert.peer] = _Member(advert, advert.expires_at_s)
            return [Joined(advert)]
        return self._renew(before, advert)

    def _renew(self, before: _Member, advert: Advert) -> list[Joined | Changed]:
        is_new_life = advert.incarnation > before.advert.incarnation
        if not is_new_life and advert.expires_at_s <= before.advert.expires_at_s:
            return []  # seen already: every poll brings the same records again
        until_s = max(before.until_s, advert.expires_at_s)
        self._members[advert.peer] = _Member(advert, until_s)
        renewed = replace(before.advert, expires_at_s=advert.expires_at_s)
        return [] if renewed == advert else [Changed(advert)]


def _decode_once(num_records: int) -> Decode:
    """`adverts.decode`, which verifies a record once: every poll brings the same records again.

    Remembers the last `num_records` good ones.
    """
    verified = lru_cache(maxsize=num_records)(authenticate)

    def decode(record: bytes, now_s: float, *, owner: str | None) -> Advert:
        advert = verified(record, owner=owner)
        check_lease(advert, now_s)
        return advert

    return decode
