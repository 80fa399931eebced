"""The swarm as a topology: what was measured, else what coordinates say, else a guess."""

from collections.abc import Mapping
from statistics import median

import numpy as np

from swarmnode.coordinator.cost.needs import effective_flops
from swarmnode.coordinator.objective import NOBODY, Arrangement
from swarmnode.coordinator.solver.request import Swarm
from swarmnode.coordinator.topology import Topology, make_topology
from swarmnode.domain import Advert, PeerId, Plan
from swarmnode.manifest import OpenJob, PlacedJob
from swarmnode.p2p.coordinates import round_trip_s

UNKNOWN_LATENCY_S = 0.02
"""One way, for a pair of which nobody knows anything: a home line to another one."""
UNKNOWN_BYTES_PER_S = 12.5e6
"""For a pair of which nobody knows anything: 100 Mbit/s."""


def survey(swarm: Swarm) -> Topology:
    """Links among all peers of `swarm`, in their order; names are peer ids.

    A path that was only measured the other way counts as measured for its latency.
    """
    peers = swarm.peers
    index = {advert.peer: i for i, advert in enumerate(peers)}
    latency_s = np.array([[_latency_s(a, b) for b in peers] for a in peers])
    bytes_per_s = np.array([[_bytes_per_s(a, b) for b in peers] for a in peers])
    known = [link for link in swarm.links if link.source in index and link.target in index]
    measured = {(link.source, link.target) for link in known}
    for link in known:
        i, j = index[link.source], index[link.target]
        latency_s[i, j] = link.latency_s
        if (link.target, link.source) not in measured:
            latency_s[j, i] = link.latency_s
        if link.bytes_per_s is not None:
            bytes_per_s[i, j] = link.bytes_per_s
    return make_topology([advert.peer for advert in peers], latency_s, bytes_per_s)


def speeds(swarm: Swarm, job: PlacedJob | OpenJob) -> dict[PeerId, float]:
    """FLOP/s of every machine: as it reached in this job, else as it says of itself, in proportion.

    What machines reach and what they say differ, by much and for all of them alike.
    """
    said = {advert.peer: effective_flops(advert, job) for advert in swarm.peers}
    reached = {peer: flops for peer, flops in swarm.flops if peer in said}
    share = median(reached[peer] / said[peer] for peer in reached) if reached else 1.0
    return {peer: reached.get(peer, share * flops) for peer, flops in said.items()}


def arrangement_of(plan: Plan, index: Mapping[PeerId, int]) -> Arrangement:
    """A plan in indices of a topology; NOBODY where the host is not in it."""
    return Arrangement(
        tuple(tuple(index.get(peer, NOBODY) for peer in row) for row in plan.slots), plan.layers
    )


def _latency_s(a: Advert, b: Advert) -> float:
    """One way, from the coordinates that both tell."""
    rtt_s = round_trip_s(a.reach.coordinate, b.reach.coordinate)
    return UNKNOWN_LATENCY_S if rtt_s is None else rtt_s / 2.0


def _bytes_per_s(a: Advert, b: Advert) -> float:
    """What the sender's uplink and the receiver's downlink both can, as far as they know."""
    known = [speed for speed in (a.reach.uplink_bytes_per_s, b.reach.downlink_bytes_per_s) if speed]
    return min(known, default=UNKNOWN_BYTES_PER_S)
