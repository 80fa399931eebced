"""Peers that sent something bad: a pure memory of them, bounded in time and size."""

from swarmnode.domain import PeerId

SUSPECT_S = 600.0
MAX_SUSPECTS = 256
"""The one whose last offence is longest ago makes room."""


class Suspects:
    """Whom to ask last, for `SUSPECT_S` after what they did."""

    def __init__(self) -> None:
        self._until_s: dict[PeerId, float] = {}

    def __len__(self) -> int:
        return len(self._until_s)

    def charge(self, peer: PeerId, now_s: float) -> None:
        """Note an offence of `peer`."""
        self._until_s.pop(peer, None)
        if len(self._until_s) >= MAX_SUSPECTS:
            del self._until_s[next(iter(self._until_s))]
        self._until_s[peer] = now_s + SUSPECT_S

    def has(self, peer: PeerId, now_s: float) -> bool:
        """Whether `peer` did something bad lately."""
        return now_s < self._until_s.get(peer, now_s)
