"""The link table: queues, sharing, small transfers and lies do not move it; time does."""

import math

import pytest

from swarmnode.domain import PeerId
from swarmnode.p2p.links import (
    KEPT_S,
    LARGE_BYTES,
    ROUND_TRIPS_KEPT_S,
    ArrivalClock,
    LinkEstimate,
    LinkTable,
)

A, B = PeerId("a"), PeerId("b")
MEBIBYTE = 1 << 20


def only(table: LinkTable, now_s: float = 0.0) -> LinkEstimate:
    (estimate,) = table.estimates(now_s).values()
    return estimate


def test_a_queue_on_the_way_does_not_count_as_latency() -> None:
    table = LinkTable()
    for when_s, rtt_s in enumerate([0.05, 0.04, 0.4, 0.9]):
        table.observe_round_trip(A, rtt_s, when_s)
    assert only(table, 3.0) == LinkEstimate(0.02, None, None, 0.0, "probe")


def test_a_longer_route_is_believed_after_a_while() -> None:
    table = LinkTable()
    table.observe_round_trip(A, 0.01, 0.0)
    table.observe_round_trip(A, 0.1, ROUND_TRIPS_KEPT_S - 1)
    assert only(table, ROUND_TRIPS_KEPT_S - 1).latency_s == 0.005
    assert only(table, ROUND_TRIPS_KEPT_S + 1).latency_s == 0.05


def test_transfers_that_shared_the_line_do_not_pull_the_bandwidth_down() -> None:
    table = LinkTable()
    for speed in (10e6, 10e6, 4e6, 2e6):
        table.observe_transfer(A, 4 * MEBIBYTE, 4 * MEBIBYTE / speed, 0.0)
    assert only(table).received_bytes_per_s == 10e6
    assert only(table).source == "transfer"


def test_one_small_transfer_that_seems_fast_does_not_outweigh_large_ones() -> None:
    table = LinkTable()
    for _ in range(3):
        table.observe_transfer(A, 8 * MEBIBYTE, 8 * MEBIBYTE / 10e6, 0.0)
    table.observe_transfer(A, LARGE_BYTES, LARGE_BYTES / 90e6, 0.0)
    assert only(table).received_bytes_per_s == pytest.approx(10e6)


def test_what_was_measured_lately_weighs_more() -> None:
    table = LinkTable()
    for when_s, speed in ((0.0, 50e6), (300.0, 5e6)):
        table.observe_transfer(A, MEBIBYTE, MEBIBYTE / speed, when_s)
    assert only(table, 300.0).received_bytes_per_s == 5e6


@pytest.mark.parametrize(
    ("num_bytes", "seconds"),
    [
        (LARGE_BYTES - 1, 1.0),
        (MEBIBYTE, 1e-4),
        (MEBIBYTE, 0.0),
        (MEBIBYTE, -1.0),
        (MEBIBYTE, math.nan),
        (MEBIBYTE, math.inf),
        (-MEBIBYTE, 1.0),
    ],
)
def test_a_transfer_that_says_nothing_is_ignored(num_bytes: int, seconds: float) -> None:
    table = LinkTable()
    table.observe_transfer(A, num_bytes, seconds, 0.0)
    assert table.estimates(0.0) == {}
    table.observe_transfer(A, LARGE_BYTES, 1.0, 0.0)
    assert only(table).received_bytes_per_s == LARGE_BYTES


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0, 1e13])
def test_impossible_words_of_a_peer_are_ignored(value: float) -> None:
    table = LinkTable()
    table.observe_round_trip(A, value, 0.0)
    table.hear(A, value, 0.0)
    assert table.estimates(0.0) == {}
    table.hear(A, 1e6, 0.0)
    assert only(table).bytes_per_s == 1e6


def test_a_transfer_counts_more_than_a_probe_until_it_is_forgotten() -> None:
    table = LinkTable()
    table.observe_transfer(A, MEBIBYTE, 1.0, 0.0, direction="sent", source="probe")
    table.hear(A, 5e6, 0.0)
    table.hear(A, 4e6, 1.0)
    assert (only(table, 1.0).bytes_per_s, only(table, 1.0).source) == (4e6, "transfer")
    later = only(table, KEPT_S["transfer"] + 2.0)
    assert (later.bytes_per_s, later.source) == (MEBIBYTE, "probe")
    assert table.estimates(KEPT_S["probe"] + 1.0) == {}


def test_the_two_directions_of_a_link_are_kept_apart() -> None:
    table = LinkTable()
    table.observe_transfer(A, MEBIBYTE, 1.0, 0.0, direction="sent", source="probe")
    table.observe_transfer(A, MEBIBYTE, 0.1, 0.0)
    assert (only(table).bytes_per_s, only(table).received_bytes_per_s) == (
        MEBIBYTE,
        MEBIBYTE / 0.1,
    )
    assert table.transfers_received(A, 0.0) == MEBIBYTE / 0.1
    assert table.transfers_received(B, 0.0) is None


def test_age_is_the_time_since_the_newest_measurement() -> None:
    table = LinkTable()
    table.observe_round_trip(A, 0.01, 3.0)
    table.observe_transfer(A, MEBIBYTE, 1.0, 5.0)
    assert only(table, 9.0).age_s == 4.0


def test_the_link_that_was_measured_longest_ago_makes_room() -> None:
    table = LinkTable(max_peers=2)
    table.observe_round_trip(A, 0.01, 0.0)
    table.observe_round_trip(B, 0.01, 1.0)
    table.observe_round_trip(A, 0.01, 2.0)
    table.observe_round_trip(PeerId("c"), 0.01, 3.0)
    assert set(table.estimates(3.0)) == {A, "c"}


def test_only_links_whose_latency_is_known_are_reported() -> None:
    table = LinkTable()
    table.hear(A, 1e6, 0.0)
    assert table.reports(0.0) == ()
    table.observe_round_trip(A, 0.02, 0.0)
    table.observe_round_trip(B, 0.04, 0.0)
    assert table.reports(0.0) == ((A, 0.01, 1e6), (B, 0.02, None))


def test_a_node_can_what_its_best_link_each_way_can() -> None:
    table = LinkTable()
    assert table.capacity(0.0) == (0.0, 0.0)
    table.hear(A, 1e6, 0.0)
    table.hear(B, 3e6, 0.0)
    table.observe_transfer(A, MEBIBYTE, 1.0, 0.0)
    assert table.capacity(0.0) == (3e6, MEBIBYTE)


# ---- timing arrivals ---------------------------------------------------------------------------


def test_a_message_takes_from_its_announcement_to_its_end() -> None:
    clock = ArrivalClock(opened_s=0.0)
    clock.announced(asked_s=1.0, now_s=2.0)
    assert clock.arrived(2.5) == 0.5
    assert clock.arrived(3.0) is None, "that one was not announced"


def test_an_announcement_that_may_have_lain_unread_for_long_is_not_believed() -> None:
    clock = ArrivalClock(opened_s=0.0)
    clock.announced(asked_s=2.0, now_s=2.0)
    assert clock.arrived(2.5) is None, "nobody knows since when"
    clock.announced(asked_s=2.65, now_s=2.65)
    assert clock.arrived(3.0) is None, "up to 0.15 s more than 0.35 s"


def test_a_short_doubt_is_halved() -> None:
    clock = ArrivalClock(opened_s=0.0)
    clock.arrived(2.0)
    clock.announced(asked_s=2.02, now_s=2.02)
    assert clock.arrived(2.52) == pytest.approx(0.51)


def test_a_message_that_lay_there_with_its_announcement_is_not_timed() -> None:
    clock = ArrivalClock(opened_s=0.0)
    clock.announced(asked_s=1.0, now_s=2.0)
    assert clock.arrived(2.001) is None
