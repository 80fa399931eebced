"""What the machines of one job have measured: the links among them, and how fast each computes."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from swarmnode.domain import PeerId
from swarmnode.messages import (
    LinkReport,
)

NEWEST_SHARE = 0.3
"""Weight of the newest step in a machine's mean speed."""
MAX_LINKS = 1 << 16


class MeasuredLink(NamedTuple):
    """One directed path, as its sender knows it."""

    source: PeerId
    target: PeerId
    latency_s: float
    """One way."""
    bytes_per_s: float | None
    """None where nobody has sent enough to tell."""


class Measurements:
    """Fed by the job's ledger with what workers report; decides nothing."""

    def __init__(self) -> None:
        self._links: dict[tuple[PeerId, PeerId], MeasuredLink] = {}
        self._busy_s: dict[PeerId, float] = {}
        self._flops: dict[PeerId, float] = {}

    def linked(self, source: PeerId, links: Sequence[LinkReport]) -> None:
        """`source` says this of its paths to others."""
        for target, latency_s, bytes_per_s in links:
            if len(self._links) < MAX_LINKS or (source, target) in self._links:
                link = MeasuredLink(source, target, latency_s, bytes_per_s)
                self._links[source, target] = link

    @property
    def links(self) -> tuple[MeasuredLink, ...]:
        return tuple(link for _, link in sorted(self._links.items()))

    def rate(self, source: PeerId, target: PeerId) -> float | None:
        """Bytes per second from one to the other; None where nobody has sent enough to tell."""
        link = self._links.get((source, target))
        return None if link is None else link.bytes_per_s

    def busy(self, peer: PeerId, seconds: float) -> None:
        """`peer` has computed for so long since it last said so."""
        self._busy_s[peer] = self._busy_s.get(peer, 0.0) + seconds

    def step_done(self, flops: Mapping[PeerId, float]) -> None:
        """A step is committed, of which each peer did so many floating-point operations."""
        for peer, count in flops.items():
            seconds = self._busy_s.get(peer, 0.0)
            if seconds > 0.0 and count > 0.0:
                before = self._flops.get(peer, count / seconds)
                # Times are averaged, not rates: a step takes as long as its machines do.
                mean_s = (1 - NEWEST_SHARE) / before + NEWEST_SHARE * seconds / count
                self._flops[peer] = 1.0 / mean_s
        self._busy_s.clear()

    def disturbed(self) -> None:
        """What was computed since the last step was not a step: do not count it."""
        self._busy_s.clear()

    def forget(self, peer: PeerId) -> None:
        """The peer is gone; when it comes back it may be on another line, and busier."""
        self._flops.pop(peer, None)
        self._busy_s.pop(peer, None)
        self._links = {key: link for key, link in self._links.items() if peer not in key}

    @property
    def flops(self) -> Mapping[PeerId, float]:
        """FLOP/s that each peer really reached in this job."""
        return dict(sorted(self._flops.items()))
