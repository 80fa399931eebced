"""Network coordinates: they predict the round trips of an irregular swarm, and withstand liars."""

import math

import numpy as np
import pytest

from benchmarks.networks import irregular_swarm
from swarmnode.domain import Coordinate, PeerId
from swarmnode.p2p.coordinates import MAX_S, has_moved, is_sound, round_trip_s, start, update

NUM_NODES = 64
PROBES_A_ROUND = 3


def settle(rtt_s: np.ndarray, num_rounds: int, seed: int, noise: float) -> list[Coordinate]:
    """Every node probes three random others a round; some round trips wait in a queue."""
    chance = np.random.default_rng(seed)
    places = [start(PeerId(f"node{i}")) for i in range(len(rtt_s))]
    for _ in range(num_rounds):
        for i in range(len(places)):
            for j in chance.choice(len(places), PROBES_A_ROUND, replace=False):
                if i != j:
                    seen_s = rtt_s[i, j] * (1.0 + noise * chance.exponential())
                    places[i] = update(places[i], places[j], seen_s)
    return places


def median_error(places: list[Coordinate], rtt_s: np.ndarray) -> float:
    errors = []
    for i, j in zip(*np.triu_indices(len(places), 1), strict=True):
        predicted_s = round_trip_s(places[i], places[j])
        errors.append(1.0 if predicted_s is None else abs(predicted_s / rtt_s[i, j] - 1.0))
    return float(np.median(errors))


@pytest.mark.parametrize("seed", range(3))
def test_an_irregular_swarm_is_predicted_after_twenty_rounds(seed: int) -> None:
    rtt_s = 2.0 * irregular_swarm(NUM_NODES, seed).latency_s
    errors = [
        median_error(settle(rtt_s, num_rounds, seed, noise=0.1), rtt_s) for num_rounds in (1, 20)
    ]
    assert errors[1] < 0.22 < errors[0]


def test_two_nodes_that_measure_each_other_agree_on_the_round_trip() -> None:
    here, there = start(PeerId("a")), start(PeerId("b"))
    for _ in range(100):
        here, there = update(here, there, 0.08), update(there, here, 0.08)
    assert round_trip_s(here, there) == pytest.approx(0.08, rel=0.02)
    assert max(here.error, there.error) < 0.1


def test_who_has_measured_nobody_predicts_nothing() -> None:
    known = Coordinate(0.1, 0.0, 0.0, 0.01, 0.2)
    assert round_trip_s(known, start(PeerId("a"))) is None
    assert round_trip_s(known, Coordinate(0.0, 0.0, 0.0, 0.01, 0.2)) == pytest.approx(0.12)


@pytest.mark.parametrize(
    "theirs",
    [
        Coordinate(math.nan, 0.0, 0.0, 0.0, 0.5),
        Coordinate(0.0, math.inf, 0.0, 0.0, 0.5),
        Coordinate(0.0, 0.0, 1e9, 0.0, 0.5),
        Coordinate(0.0, 0.0, 0.0, -1.0, 0.5),
        Coordinate(0.0, 0.0, 0.0, 1e9, 0.5),
        Coordinate(0.0, 0.0, 0.0, 0.0, -0.5),
        Coordinate(0.0, 0.0, 0.0, 0.0, math.nan),
        Coordinate(0.0, 0.0, 0.0, 0.0, 2.0),
    ],
)
def test_what_no_honest_node_can_say_moves_nobody(theirs: Coordinate) -> None:
    mine = Coordinate(0.01, 0.02, 0.03, 0.004, 0.5)
    assert not is_sound(theirs)
    assert update(mine, theirs, 0.05) == mine
    assert update(mine, Coordinate(error=0.5), 0.05) != mine


@pytest.mark.parametrize("rtt_s", [math.nan, math.inf, 0.0, -1.0, MAX_S + 1])
def test_an_impossible_round_trip_moves_nobody(rtt_s: float) -> None:
    mine = Coordinate(0.01, 0.02, 0.03, 0.004, 0.5)
    assert update(mine, Coordinate(error=0.5), rtt_s) == mine


def test_one_liar_moves_us_by_a_bounded_step_only() -> None:
    mine = Coordinate(0.01, 0.02, 0.03, 0.004, 0.1)
    moved = update(mine, Coordinate(MAX_S, MAX_S, MAX_S, MAX_S, 0.0), 0.001)
    assert is_sound(moved)
    assert math.dist(mine[:3], moved[:3]) < 0.35 * (math.sqrt(3) + 1) * MAX_S


def test_two_nodes_at_one_spot_do_not_divide_by_zero() -> None:
    spot = Coordinate(error=0.5)
    assert is_sound(update(spot, spot, 0.05))


def test_the_swarm_is_told_of_a_move_and_not_of_noise() -> None:
    place = Coordinate(0.1, 0.0, 0.0, 0.01, 0.2)
    assert not has_moved(place, place._replace(x_s=0.102, error=0.25))
    assert has_moved(place, place._replace(x_s=0.12))
    assert has_moved(place, place._replace(height_s=0.03))
    assert has_moved(place, place._replace(error=0.6))
