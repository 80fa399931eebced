"""1F1B: order, bound and progress under any order of arrival."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmnode.worker.training.schedule import Direction, SlotSchedule, Work
from swarmnode.worker.training.slots import microbatches_of, num_evaluation_microbatches


def run(
    stage: int, num_stages: int, microbatches: list[int], arrivals: list[int], ahead: int = 0
) -> list[Work]:
    """Work off a slot whose inputs arrive one by one, in the order that `arrivals` draws."""
    slot = SlotSchedule(stage=stage, num_stages=num_stages, microbatches=microbatches, ahead=ahead)
    both: tuple[Direction, ...] = ("forward", "backward")
    pending = [(d, mb) for d in both for mb in microbatches if slot.wants(d, mb)]
    if stage == num_stages - 1:
        pending = [(d, mb) for d, mb in pending if d == "forward"]
    done: list[Work] = []
    while True:
        while (work := slot.next()) is not None:
            slot.done(work)
            done.append(work)
        if not pending:
            break
        possible = [
            p for p in pending if p[0] == "forward" or Work("forward", p[1]) in done
        ] or pending  # fmt: skip
        chosen = possible[arrivals.pop() % len(possible)]
        pending.remove(chosen)
        slot.arrived(*chosen)
    assert slot.is_finished
    return done


@settings(deadline=None)
@given(
    data=st.data(), num_stages=st.integers(1, 5), count=st.integers(0, 8), ahead=st.integers(0, 3)
)
def test_any_order_of_arrival_ends_in_order_and_within_the_bound(
    data: st.DataObject, num_stages: int, count: int, ahead: int
) -> None:
    stage = data.draw(st.integers(0, num_stages - 1))
    microbatches = [1 + 3 * number for number in range(count)]
    arrivals = data.draw(st.lists(st.integers(0, 100), min_size=2 * count, max_size=2 * count))
    done = run(stage, num_stages, microbatches, arrivals, ahead)
    bound = num_stages - stage + (ahead if stage < num_stages - 1 else 0)
    for direction in ("forward", "backward"):
        assert [w.microbatch for w in done if w.direction == direction] == microbatches
    in_flight = 0
    for work in done:
        in_flight += 1 if work.direction == "forward" else -1
        assert 0 <= in_flight <= bound


def test_a_backward_goes_before_a_forward() -> None:
    slot = SlotSchedule(stage=0, num_stages=2, microbatches=[0, 1, 2])
    slot.done(Work("forward", 0))
    slot.arrived("backward", 0)
    assert slot.next() == Work("backward", 0)


def test_the_first_stage_waits_when_its_depth_is_in_flight() -> None:
    slot = SlotSchedule(stage=0, num_stages=2, microbatches=[0, 1, 2])
    slot.done(Work("forward", 0))
    slot.done(Work("forward", 1))
    assert slot.next() is None
    assert not slot.is_finished


def test_ahead_fills_a_slow_line_with_so_many_more() -> None:
    slot = SlotSchedule(stage=0, num_stages=2, microbatches=[*range(9)], ahead=3)
    for microbatch in range(5):
        slot.done(Work("forward", microbatch))
    assert slot.next() is None


def test_the_last_stage_alternates() -> None:
    done = run(1, 2, [0, 2], [0, 0, 0, 0])
    assert [w.direction for w in done] == ["forward", "backward", "forward", "backward"]


def test_forward_only_has_no_backwards_and_no_bound() -> None:
    slot = SlotSchedule(stage=0, num_stages=2, microbatches=[0, 1, 2], forward_only=True)
    for microbatch in (0, 1, 2):
        slot.done(Work("forward", microbatch))
    assert slot.is_finished
    assert slot.next() is None


def test_foreign_and_repeated_inputs_are_not_wanted() -> None:
    slot = SlotSchedule(stage=1, num_stages=3, microbatches=[1, 3])
    assert slot.wants("forward", 3)
    assert not slot.wants("forward", 2)
    slot.arrived("forward", 3)
    assert not slot.wants("forward", 3)


def test_pipelines_partition_the_microbatches() -> None:
    owned = [microbatches_of(v, num_slots=3, num_microbatches=9) for v in range(3)]
    assert owned == [(0, 3, 6), (1, 4, 7), (2, 5, 8)]


@pytest.mark.parametrize(
    ("wanted", "available", "num_slots", "count"),
    [(16, 100, 4, 16), (16, 7, 4, 4), (5, 100, 2, 4), (16, 3, 4, 3), (1, 9, 1, 1)],
)
def test_an_evaluation_takes_a_whole_number_of_rounds(
    wanted: int, available: int, num_slots: int, count: int
) -> None:
    assert count == num_evaluation_microbatches(
        wanted=wanted, available=available, num_slots=num_slots
    )
