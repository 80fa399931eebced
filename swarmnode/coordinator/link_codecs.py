"""Which links carry their boundary frames more coarsely than the job asks for, and since when.

A link that would stall the pipeline goes to the next coarser preset, and back when the finer one
would clearly fit. Both must have been so for a while, and going back takes longer, twice as long
each time that it turned out to be wrong: a line whose speed swings stays at the coarser level.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from swarmnode.boundary_codecs import Level, Link, boundary_links
from swarmnode.coordinator.transition import MARGIN, RESTART_S
from swarmnode.domain import Generation, LinkPreset, PeerId, Plan

COARSER_ABOVE = 1.1
"""A sender's line that is busy for longer than this, in times of the computing, stalls it."""
FINER_BELOW = 0.7
"""The finer codecs must fit into this share of the computing: far enough below to stay there."""
LEAST_SAVING = 0.1
"""Share of the computing that coarser codecs must save on the line: else it is another link."""
COARSER_AFTER_S = 15.0
FINER_AFTER_S = 60.0
LEAST_STEPS = 3
"""Committed steps, too, for which a link must have been so."""
MOST_DOUBLINGS = 6


class LineLoad(NamedTuple):
    """What a step puts on the line of a link's sender, by the measured rates."""

    busy_s: tuple[float, ...]
    """Seconds for all its boundary frames, if this link was at each of the job's levels."""


@dataclass(frozen=True)
class _Urge:
    """A link would be better off at another level, and since when."""

    is_coarser: bool
    since_s: float
    num_steps: int


class LinkCodecs:
    """The level of each link of one job. Pure: told after each commit what lines have to carry.

    What is decided here counts once a generation is formed with it: see `links_of`.
    """

    def __init__(self, levels: Sequence[Level]) -> None:
        """`levels` are the job's, its own codecs first; with only these nothing ever changes."""
        self._levels = tuple(levels)
        self._at: dict[Link, int] = {}
        """Of the links that are not at the lowest."""
        self._urges: dict[Link, _Urge] = {}
        self._num_returns: dict[Link, int] = {}
        """How often a link went back to a finer level."""
        self._generation = Generation(0)

    @property
    def levels(self) -> tuple[Level, ...]:
        return self._levels

    @property
    def can_change(self) -> bool:
        return len(self._levels) > 1

    def level(self, link: Link) -> int:
        """From 0, the job's own codecs, to the coarsest."""
        return self._at.get(link, 0)

    def restore(self, links: Iterable[LinkPreset]) -> None:
        """A plan of the journal has these."""
        names = [level.preset for level in self._levels]
        found = {(link.source, link.target): link.preset for link in links}
        self._at = {link: names.index(name) for link, name in found.items() if name in names}

    def see(
        self,
        generation: Generation,
        loads: Mapping[Link, LineLoad],
        computing_s: float,
        steps_left: int,
        now_s: float,
    ) -> None:
        """A step is committed: what the links of the plan have to carry, where it is known.

        `computing_s` is what the slowest machine computes in a step. A new generation begins
        without what was seen in the one before. Of a sender's links one changes at a time: `loads`
        do not know of it yet, and with it the others may do as they are.
        """
        if generation != self._generation:
            self._generation = generation
            self._urges.clear()
        before, self._urges = self._urges, {}
        changed: set[PeerId] = set()
        """Senders of which a link has."""
        for link, load in sorted(loads.items()):
            level = self.level(link)
            wish = self._wish(level, load.busy_s, computing_s, steps_left)
            if wish is None:
                continue
            urge, is_coarser = before.get(link), wish > level
            if urge is None or urge.is_coarser != is_coarser:
                urge = _Urge(is_coarser, now_s, 0)
            self._urges[link] = urge = replace(urge, num_steps=urge.num_steps + 1)
            is_long = now_s - urge.since_s >= self._patience_s(link, is_coarser=is_coarser)
            sender, _ = link
            if is_long and urge.num_steps >= LEAST_STEPS and sender not in changed:
                del self._urges[link]
                self._change(link, wish)
                changed.add(sender)

    def forget(self, peer: PeerId) -> None:
        """The peer is gone; when it comes back it may be on another line."""
        for table in (self._at, self._urges, self._num_returns):
            for link in [link for link in table if peer in link]:
                del table[link]

    def links_of(self, plan: Plan) -> tuple[LinkPreset, ...]:
        """What a plan with these hosts says of its links."""
        found = []
        for link in sorted(boundary_links(plan)):
            name, codecs = self._levels[self.level(link)]
            if name:
                found.append(LinkPreset(*link, name, *codecs))
        return tuple(found)

    def is_due(self, plan: Plan) -> bool:
        """Whether the links of the running plan should be coded otherwise."""
        return self.links_of(plan) != plan.links

    def _wish(
        self, level: int, busy_s: Sequence[float], computing_s: float, steps_left: int
    ) -> int | None:
        """The level to go to by what was seen in this step alone; None to stay.

        It is the next one that makes a difference: to a link that carries gradients alone, a level
        that is coarser for hidden states makes none.
        """
        now_s = busy_s[level]
        if now_s > COARSER_ABOVE * computing_s:
            for higher in range(level + 1, len(self._levels)):
                if now_s - busy_s[higher] >= LEAST_SAVING * computing_s:
                    gained_s = now_s - max(busy_s[higher], computing_s)
                    return higher if gained_s * steps_left > MARGIN * RESTART_S else None
            return None
        finer_s = next((s for s in reversed(busy_s[:level]) if s != now_s), math.inf)
        if finer_s >= FINER_BELOW * computing_s:
            return None
        lower = busy_s.index(finer_s)
        return lower if computing_s * steps_left > MARGIN * RESTART_S else None

    def _patience_s(self, link: Link, *, is_coarser: bool) -> float:
        if is_coarser:
            return COARSER_AFTER_S
        return FINER_AFTER_S * 2.0 ** min(self._num_returns.get(link, 0), MOST_DOUBLINGS)

    def _change(self, link: Link, level: int) -> None:
        if level < self.level(link):
            self._num_returns[link] = self._num_returns.get(link, 0) + 1
        if level:
            self._at[link] = level
        else:
            del self._at[link]
