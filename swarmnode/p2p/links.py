"""What this node has measured of its links: a pure table, fed by transfers, probes and pings.

Latency is the least round trip seen lately, halved: queues only ever add to it. Bandwidth is kept
for each direction. Transfers are timed where they arrive, so what we send to a peer is known from
probes that it timed, and from what it tells us of our transfers.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from swarmnode.domain import PeerId
from swarmnode.messages import (
    LinkReport,
)

Source = Literal["transfer", "probe"]
Direction = Literal["sent", "received"]

MAX_PEERS = 1024
"""Links that are remembered; the one that was measured longest ago makes room."""
MAX_SAMPLES = 32
LARGE_BYTES = 256 << 10
"""A smaller transfer says more about latency and buffers than about bandwidth."""
MIN_SECONDS: Mapping[Source, float] = {"transfer": 0.002, "probe": 0.0002}
"""A shorter time is mostly the wake-ups of this process; a probe has nothing better."""
ROUND_TRIPS_KEPT_S = 1800.0
"""A route that has become longer is believed after this long."""
KEPT_S: Mapping[Source, float] = {"transfer": 600.0, "probe": 3600.0}
"""Probes are rare, so they count for longer; a transfer takes precedence while it counts."""
HALF_LIFE_S = 60.0
"""A sample of that age weighs half as much as a new one."""
QUANTILE = 0.75
"""Sharing a line makes a transfer slower than the link, and nothing makes it faster."""
MAX_ROUND_TRIP_S = 60.0
MAX_BYTES_PER_S = 1e12

OnTransfer = Callable[[PeerId, int, float], None]
"""Called with who sent, how many bytes, and the seconds in which they arrived."""


def ignore_transfer(peer: PeerId, num_bytes: int, seconds: float) -> None:
    """Measure nothing."""


class _Sample(NamedTuple):
    when_s: float
    num_bytes: float
    bytes_per_s: float


@dataclass(frozen=True)
class LinkEstimate:
    """What is known of the two directed paths between this node and a peer."""

    latency_s: float | None
    """One way: half a round trip. None if there was none."""
    bytes_per_s: float | None
    """From this node to the peer."""
    received_bytes_per_s: float | None
    """From the peer to this node."""
    age_s: float
    """Since the newest measurement of any kind."""
    source: Source
    """Where the newest bandwidth comes from; "probe" if there is only a round trip."""


@dataclass
class _Link:
    round_trips: deque[tuple[float, float]] = field(
        default_factory=lambda: deque(maxlen=MAX_SAMPLES)
    )
    flows: dict[tuple[Direction, Source], deque[_Sample]] = field(default_factory=dict)
    seen_s: float = -math.inf

    def add(self, direction: Direction, source: Source, sample: _Sample) -> None:
        samples = self.flows.setdefault((direction, source), deque(maxlen=MAX_SAMPLES))
        samples.append(sample)

    def rate(self, direction: Direction, now_s: float) -> tuple[float | None, Source]:
        """The bandwidth in one direction, from transfers if any of them still counts."""
        kinds: tuple[Source, Source] = ("transfer", "probe")
        for source in kinds:
            samples = self.fresh(direction, source, now_s)
            if samples:
                return _typical(samples, now_s), source
        return None, "probe"

    def fresh(self, direction: Direction, source: Source, now_s: float) -> list[_Sample]:
        since_s = now_s - KEPT_S[source]
        return [s for s in self.flows.get((direction, source), ()) if s.when_s > since_s]

    def latency_s(self, now_s: float) -> float | None:
        fresh = [rtt_s for when_s, rtt_s in self.round_trips if when_s > now_s - ROUND_TRIPS_KEPT_S]
        return min(fresh) / 2 if fresh else None


class LinkTable:
    """Links by peer. Impossible measurements are ignored: they may come from the other end."""

    def __init__(self, *, max_peers: int = MAX_PEERS) -> None:
        self._max_peers = max_peers
        self._links: dict[PeerId, _Link] = {}

    def observe_round_trip(self, peer: PeerId, rtt_s: float, now_s: float) -> None:
        """A message went to `peer`, and the answer came after `rtt_s`."""
        if 0.0 < rtt_s <= MAX_ROUND_TRIP_S:
            self._touch(peer, now_s).round_trips.append((now_s, rtt_s))

    def observe_transfer(
        self,
        peer: PeerId,
        num_bytes: int,
        seconds: float,
        now_s: float,
        *,
        direction: Direction = "received",
        source: Source = "transfer",
    ) -> None:
        """`num_bytes` arrived within `seconds`, timed at the end where they arrived.

        Ignored below LARGE_BYTES or MIN_SECONDS; a probe may be of any size.
        """
        is_large = num_bytes >= LARGE_BYTES or source == "probe"
        if (
            is_large
            and seconds >= MIN_SECONDS[source]
            and 0.0 < num_bytes / seconds <= MAX_BYTES_PER_S
        ):
            sample = _Sample(now_s, num_bytes, num_bytes / seconds)
            self._touch(peer, now_s).add(direction, source, sample)

    def hear(self, peer: PeerId, bytes_per_s: float, now_s: float) -> None:
        """`peer` says at what rate our transfers reach it; its last word counts."""
        if 0.0 < bytes_per_s <= MAX_BYTES_PER_S:
            link = self._touch(peer, now_s)
            link.flows.pop(("sent", "transfer"), None)
            link.add("sent", "transfer", _Sample(now_s, LARGE_BYTES, bytes_per_s))

    def estimates(self, now_s: float) -> Mapping[PeerId, LinkEstimate]:
        """Every link of which something is known that still counts, by peer id."""
        found = {peer: self._estimate(link, now_s) for peer, link in sorted(self._links.items())}
        return {peer: estimate for peer, estimate in found.items() if estimate is not None}

    def reports(self, now_s: float) -> tuple[LinkReport, ...]:
        """The paths from here whose latency is known, as messages tell them."""
        return tuple(
            LinkReport(peer, link.latency_s, link.bytes_per_s)
            for peer, link in self.estimates(now_s).items()
            if link.latency_s is not None
        )

    def estimate(self, peer: PeerId, now_s: float) -> LinkEstimate | None:
        """One of `estimates`, or None."""
        link = self._links.get(peer)
        return None if link is None else self._estimate(link, now_s)

    def transfers_received(self, peer: PeerId, now_s: float) -> float | None:
        """The rate at which the transfers of `peer` reach us: what it should hear."""
        link = self._links.get(peer)
        samples = link.fresh("received", "transfer", now_s) if link else []
        return _typical(samples, now_s) if samples else None

    def capacity(self, now_s: float) -> tuple[float, float]:
        """Bytes/s that this node can send and receive: its best link each way, 0 if unknown."""
        links = self.estimates(now_s).values()
        sent = max((link.bytes_per_s or 0.0 for link in links), default=0.0)
        received = max((link.received_bytes_per_s or 0.0 for link in links), default=0.0)
        return sent, received

    def _estimate(self, link: _Link, now_s: float) -> LinkEstimate | None:
        latency_s = link.latency_s(now_s)
        sent, sent_by = link.rate("sent", now_s)
        received, received_by = link.rate("received", now_s)
        if latency_s is None and sent is None and received is None:
            return None
        source = sent_by if sent is not None else received_by
        return LinkEstimate(latency_s, sent, received, max(0.0, now_s - link.seen_s), source)

    def _touch(self, peer: PeerId, now_s: float) -> _Link:
        if peer not in self._links and len(self._links) >= self._max_peers:
            del self._links[min(self._links, key=lambda known: self._links[known].seen_s)]
        link = self._links.setdefault(peer, _Link())
        link.seen_s = max(link.seen_s, now_s)
        return link


def _typical(samples: Iterable[_Sample], now_s: float) -> float:
    """A high quantile of the rates, weighted by size and recency; at least one sample."""
    weighted = sorted(
        (s.bytes_per_s, s.num_bytes * 0.5 ** ((now_s - s.when_s) / HALF_LIFE_S)) for s in samples
    )
    left = QUANTILE * sum(weight for _, weight in weighted)
    for bytes_per_s, weight in weighted:
        left -= weight
        if left <= 0.0:
            return bytes_per_s
    return weighted[-1][0]


class ArrivalClock:
    """Times a large message on a stream from the short announcement right in front of it.

    A message that lay unread has arrived at an unknown time: after the one before it was read,
    and before it was read itself. Such a time counts if what is unknown of it is little.
    """

    LAIN_S = 0.0005
    """A message that is there within this time may have lain there."""
    MAX_DOUBT = 0.25

    def __init__(self, opened_s: float) -> None:
        self._read_s = opened_s
        self._announced: tuple[float, float] | None = None
        """The earliest and the latest time at which the message can have begun."""

    def announced(self, asked_s: float, now_s: float) -> None:
        """We asked for a message at `asked_s`, and at `now_s` had the announcement."""
        earliest_s = self._read_s if now_s - asked_s < self.LAIN_S else now_s
        self._announced = (earliest_s, now_s)
        self._read_s = now_s

    def arrived(self, now_s: float) -> float | None:
        """Another message was read at `now_s`: the seconds that it took, if they are known."""
        announced, self._announced, self._read_s = self._announced, None, now_s
        if announced is None:
            return None
        earliest_s, latest_s = announced
        shortest_s = now_s - latest_s
        if (
            shortest_s < MIN_SECONDS["transfer"]
            or latest_s - earliest_s > self.MAX_DOUBT * shortest_s
        ):
            return None
        return now_s - (earliest_s + latest_s) / 2
