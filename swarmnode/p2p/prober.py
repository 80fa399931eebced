"""Whom a node visits to measure its links, and when: a few peers now and then, the needed first."""

import asyncio
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet

from swarmnode.domain import Advert, PeerId, Reach
from swarmnode.errors import PeerError
from swarmnode.p2p import coordinates
from swarmnode.p2p.links import LinkTable
from swarmnode.p2p.ports import Transport
from swarmnode.p2p.probing import Clock, probe

FIRST_S = 2.0
ROUND_S = 30.0
EAGER_S = 5.0
"""Between rounds while somebody has never been visited."""
PEERS_A_ROUND = 3
MAX_NEIGHBOURS = 32
"""Peers without a common job that are visited at all: enough for a coordinate."""
PARTNER_LEAD_S = 300.0
"""A peer of a common job is visited as if its last visit were this much longer ago."""
FREE_BURSTS = 8
BURST_EVERY_S = 300.0
"""Bursts to peers without a common job, once the first ones are spent."""
BURST_AGAIN_S = 1800.0


class Prober:
    """Keeps the table and our coordinate fresh; one round at a time, one peer after the other."""

    def __init__(
        self,
        transport: Transport,
        table: LinkTable,
        peers: Callable[[], Sequence[Advert]],
        partners: Callable[[], AbstractSet[PeerId]],
        chance: random.Random,
        clock: Clock = time.monotonic,
    ) -> None:
        self._transport = transport
        self._table = table
        self._peers = peers
        self._partners = partners
        self._chance = chance
        self._clock = clock
        self._visited_s: dict[PeerId, float] = {}
        self._burst_s: dict[PeerId, float] = {}
        self._neighbours: set[PeerId] = set()
        self._num_bursts = 0
        self._last_burst_s = -math.inf
        self._reach = Reach(coordinates.start(transport.peer))
        self.coordinate = self._reach.coordinate

    async def run(self) -> None:
        """Visit peers for ever."""
        await asyncio.sleep(FIRST_S * self._chance.uniform(0.5, 1.5))
        while True:
            is_done = await self.visit_some()
            pause_s = ROUND_S if is_done else EAGER_S
            await asyncio.sleep(pause_s * self._chance.uniform(0.8, 1.2))

    async def visit_some(self) -> bool:
        """One round; whether everybody who matters has been visited at least once."""
        present = {a.peer: a for a in self._peers() if a.peer != self._transport.peer}
        partners = self._partners() & present.keys()
        self._meet(present)
        pool = sorted(partners | self._neighbours)
        for peer in self._stalest(pool, partners)[:PEERS_A_ROUND]:
            await self._visit(present[peer], is_partner=peer in partners)
        return bool(pool) and all(peer in self._visited_s for peer in pool)

    def reach(self) -> Reach:
        """What our advert says: it changes when a measurement really has changed."""
        now_s = self._clock()
        speeds = self._table.capacity(now_s)
        before = self._reach
        said = (before.uplink_bytes_per_s, before.downlink_bytes_per_s)
        is_new = coordinates.has_moved(before.coordinate, self.coordinate)
        if is_new or any(abs(a - b) > 0.2 * max(a, b) for a, b in zip(said, speeds, strict=True)):
            self._reach = Reach(self.coordinate, *(float(round(speed)) for speed in speeds))
        return self._reach

    def _meet(self, present: Mapping[PeerId, Advert]) -> None:
        """Forget who is gone, and choose neighbours among the others while there is room."""
        self._neighbours &= present.keys()
        for times in (self._visited_s, self._burst_s):
            for peer in [peer for peer in times if peer not in present]:
                del times[peer]
        strangers = sorted(present.keys() - self._neighbours)
        self._chance.shuffle(strangers)
        self._neighbours.update(strangers[: MAX_NEIGHBOURS - len(self._neighbours)])

    def _stalest(self, pool: list[PeerId], partners: AbstractSet[PeerId]) -> list[PeerId]:
        """Those whose last visit is longest ago come first, those of a common job before others."""
        self._chance.shuffle(pool)

        def last_s(peer: PeerId) -> tuple[float, bool]:
            lead_s = PARTNER_LEAD_S if peer in partners else 0.0
            return self._visited_s.get(peer, -math.inf) - lead_s, peer not in partners

        return sorted(pool, key=last_s)

    async def _visit(self, advert: Advert, *, is_partner: bool) -> None:
        peer, now_s = advert.peer, self._clock()
        self._visited_s[peer] = now_s
        with_burst = self._needs_burst(peer, now_s, is_partner=is_partner)
        if with_burst:
            self._burst_s[peer] = self._last_burst_s = now_s
            self._num_bursts += 1
        try:
            found = await probe(
                self._transport,
                peer,
                advert.addresses,
                self._table,
                with_burst=with_burst,
                clock=self._clock,
            )
        except PeerError:
            return  # whoever has business with it will notice, too
        if found is not None:
            self.coordinate = coordinates.update(self.coordinate, found.coordinate, found.rtt_s)

    def _needs_burst(self, peer: PeerId, now_s: float, *, is_partner: bool) -> bool:
        """Whether nothing tells the bandwidth to `peer`, and a burst is not too much to ask."""
        estimate = self._table.estimate(peer, now_s)
        is_known = estimate is not None and estimate.bytes_per_s is not None
        if is_known and estimate is not None and estimate.source == "transfer":
            return False
        if now_s < self._burst_s.get(peer, -math.inf) + (BURST_AGAIN_S if is_known else ROUND_S):
            return False
        is_cheap = self._num_bursts < FREE_BURSTS or now_s >= self._last_burst_s + BURST_EVERY_S
        return is_cheap or (is_partner and not is_known)
