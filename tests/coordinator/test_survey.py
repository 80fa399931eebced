"""What the solver is told of links: measured first, then coordinates, then a guess."""

from dataclasses import replace

import pytest

from swarmnode.coordinator.measurements import MeasuredLink
from swarmnode.coordinator.outlook import Outlook
from swarmnode.coordinator.solver.request import Swarm
from swarmnode.coordinator.survey import (
    UNKNOWN_BYTES_PER_S,
    UNKNOWN_LATENCY_S,
    speeds,
    survey,
)
from swarmnode.coordinator.topology import LOCAL_BYTES_PER_S
from swarmnode.domain import Coordinate, Generation, PeerId, Plan, Reach
from swarmnode.manifest import PlacedJob
from tests.coordinator.bench import FACTS, advert, manifest

JOB = PlacedJob(name="j")
A, B, C = (PeerId(name) for name in "abc")


def test_strangers_get_the_same_guess_in_both_directions() -> None:
    topology = survey(Swarm((advert("a"), advert("b"))))
    assert topology.names == ("a", "b")
    assert topology.latency_s.tolist() == [[0, UNKNOWN_LATENCY_S], [UNKNOWN_LATENCY_S, 0]]
    assert topology.bytes_per_s[0, 1] == topology.bytes_per_s[1, 0] == UNKNOWN_BYTES_PER_S
    assert topology.bytes_per_s[0, 0] == LOCAL_BYTES_PER_S


def test_coordinates_and_lines_stand_in_for_what_nobody_measured() -> None:
    near = Reach(Coordinate(0.0, 0.0, 0.0, 0.005, 0.2), 1e6, 8e6)
    far = Reach(Coordinate(0.08, 0.0, 0.0, 0.005, 0.2), 2e6, 3e6)
    topology = survey(Swarm((replace(advert("a"), reach=near), replace(advert("b"), reach=far))))
    assert topology.latency_s[0, 1] == pytest.approx(0.045)
    assert topology.bytes_per_s[0, 1] == 1e6  # the sender's uplink
    assert topology.bytes_per_s[1, 0] == 2e6


def test_who_was_never_timed_is_taken_for_as_much_slower_as_the_others() -> None:
    peers = (advert("a", flops=1e9), advert("b", flops=3e9), advert("c", flops=2e9))
    told = speeds(Swarm(peers), JOB)
    assert told[B] == pytest.approx(3 * told[A])
    timed = speeds(Swarm(peers, flops=((A, told[A] / 10), (B, told[B] / 10))), JOB)
    assert timed == pytest.approx({A: told[A] / 10, B: told[B] / 10, C: told[C] / 10})


def test_what_was_measured_counts_first_and_latency_both_ways() -> None:
    links = (
        MeasuredLink(A, B, 0.1, 5e6),
        MeasuredLink(B, C, 0.2, None),
        MeasuredLink(C, B, 0.3, 7e6),
        MeasuredLink(A, PeerId("gone"), 9.0, 9.0),
    )
    topology = survey(Swarm((advert("a"), advert("b"), advert("c")), links))
    assert (topology.latency_s[0, 1], topology.latency_s[1, 0]) == (0.1, 0.1)
    assert (topology.latency_s[1, 2], topology.latency_s[2, 1]) == (0.2, 0.3)
    assert (topology.bytes_per_s[0, 1], topology.bytes_per_s[2, 1]) == (5e6, 7e6)
    assert topology.bytes_per_s[1, 2] == UNKNOWN_BYTES_PER_S


def test_where_none_of_a_plans_machines_is_usable_no_step_is_predicted() -> None:
    """All may be barred for a while, and others be here: that must not end the job."""
    job, peer = manifest(stages=1, slots=1), PeerId("a")
    plan = Plan(Generation(1), ((0, FACTS.num_layers),), ((peer,),), peer)
    outlook = Outlook(FACTS, job, peer)
    outlook.predict(plan, [advert("a"), advert("z")], 0.0)
    assert outlook.predicted_s is not None
    outlook.predict(plan, [advert("z")], 1000.0)
    assert outlook.predicted_s is None
