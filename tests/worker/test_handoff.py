"""From what is here to what is assigned: the least work, and never a state of another history."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmnode.domain import BlobRef
from swarmnode.errors import DataError
from swarmnode.messages import (
    Committed,
    Held,
    StateSource,
)
from swarmnode.worker.handoff import Handoff, Holding, held, plan_handoff, retained

KEEP, INIT = StateSource("keep"), StateSource("init")
INDEX = BlobRef("f" * 64, 9)


def ref(step: int, history: str = "0") -> BlobRef:
    return BlobRef(f"{step:063x}{history}", 10)


def commits(start: int, stop: int) -> list[Committed]:
    return [Committed(s, 0.5, (BlobRef("0" * 64, 1), ref(s))) for s in range(start, stop)]


def log(start: int, stop: int) -> dict[int, BlobRef]:
    return {step: ref(step) for step in range(start, stop)}


def plan(step: int, source: StateSource, holding: Holding, known: list[Committed]) -> Handoff:
    return plan_handoff(1, step, source, holding, known)


def steps(found: Handoff) -> list[tuple[int, bool]]:
    return [(update.step, update.is_ours) for update in found.updates]


def test_memory_at_the_step_needs_nothing() -> None:
    found = plan(7, KEEP, Holding(7, (5,), log(5, 8)), commits(5, 7))
    assert (found.how, found.step, found.updates) == ("keep", 7, ())
    assert found.stale_log == (7,), "prepared, but not committed"


def test_memory_behind_replays_its_own_log_and_fetches_the_rest() -> None:
    found = plan(8, KEEP, Holding(5, (0, 4), log(0, 6)), commits(0, 8))
    assert (found.how, found.step) == ("keep", 5)
    assert steps(found) == [(5, True), (6, False), (7, False)]
    assert [u.ref for u in found.to_fetch] == [ref(6), ref(7)]
    assert all(u.scale == 0.5 for u in found.updates)
    assert (found.stale_log, found.stale_snapshots) == ((), ())


def test_a_prepared_update_that_is_not_the_committed_one_is_fetched() -> None:
    holding = Holding(5, (4,), {4: ref(4), 5: ref(5, "b")})
    assert steps(plan(6, KEEP, holding, commits(4, 6))) == [(5, False)]


def test_memory_beyond_the_step_is_discarded_for_the_newest_file_before_it() -> None:
    found = plan(6, KEEP, Holding(7, (2, 4, 7), log(2, 7)), commits(2, 6))
    assert (found.how, found.step, steps(found)) == ("load", 4, [(4, True), (5, True)])
    assert (found.stale_snapshots, found.stale_log) == ((7,), (6,))


def test_without_memory_or_file_the_own_start_is_replayed() -> None:
    found = plan(3, KEEP, Holding(None, (), log(0, 3)), commits(0, 3))
    assert (found.how, found.step, len(found.updates)) == ("init", 0, 3)


def test_a_state_with_an_update_that_was_never_committed_is_no_base() -> None:
    other = {4: ref(4), 5: ref(5, "b"), 6: ref(6, "b")}
    found = plan(7, KEEP, Holding(7, (4, 6), other), commits(4, 7))
    assert (found.how, found.step) == ("load", 4)
    assert steps(found) == [(4, True), (5, False), (6, False)]
    assert found.stale_snapshots == (6,)


def test_fetch_and_init_begin_a_history_of_their_own() -> None:
    holding = Holding(6, (3, 5), log(3, 7))
    found = plan(7, StateSource("fetch", 5, INDEX), holding, commits(5, 7))
    assert (found.how, found.step, steps(found)) == ("fetch", 5, [(5, True), (6, True)])
    assert (found.stale_log, found.stale_snapshots) == ((3, 4), (3, 5))
    fresh = plan(0, INIT, holding, [])
    assert (fresh.how, fresh.step, fresh.stale_log) == ("init", 0, (3, 4, 5, 6))


@pytest.mark.parametrize(
    ("source", "holding", "known"),
    [
        (KEEP, Holding(4), commits(5, 7)),
        (KEEP, Holding(8), commits(8, 7)),
        (KEEP, Holding(None, (), {}, starts_itself=False), commits(0, 7)),
        (INIT, Holding(), commits(1, 7)),
        (StateSource("fetch", 4, INDEX), Holding(7), commits(5, 7)),
    ],
    ids=["a gap", "beyond", "no start of its own", "no first update", "a gap behind the fetched"],
)
def test_what_cannot_be_reached_is_said_in_one_line(
    source: StateSource, holding: Holding, known: list[Committed]
) -> None:
    with pytest.raises(DataError, match="stage 1 cannot come to step 7") as failure:
        plan(7, source, holding, known)
    assert "\n" not in str(failure.value)


@given(
    step=st.integers(0, 12),
    memory=st.none() | st.integers(0, 12),
    snapshots=st.sets(st.integers(0, 12), max_size=3),
    bounds=st.tuples(st.integers(0, 12), st.integers(0, 13)),
    strange=st.sets(st.integers(0, 12)),
    known_from=st.integers(0, 12),
)
def test_any_plan_is_gapless_committed_and_of_one_history(
    step: int,
    memory: int | None,
    snapshots: set[int],
    bounds: tuple[int, int],
    strange: set[int],
    known_from: int,
) -> None:
    entries = {s: ref(s, "b" if s in strange else "0") for s in range(*bounds)}
    holding = Holding(memory, tuple(sorted(snapshots)), entries)
    known = commits(min(known_from, step), step)
    try:
        found = plan(step, KEEP, holding, known)
    except DataError:
        return
    by_step = {c.step: c.updates[1] for c in known}
    assert [u.step for u in found.updates] == list(range(found.step, step))
    assert all(u.ref == by_step[u.step] for u in found.updates)
    assert all(entries.get(u.step) == u.ref for u in found.updates if u.is_ours)
    if found.how in ("keep", "load"):
        inside = [s for s in entries if s < found.step and s in by_step]
        assert all(entries[s] == by_step[s] for s in inside), "a wrong update is in the base"
    left = {s for s in entries if s not in found.stale_log}
    assert all(s < step for s in left), "only what is committed stays"
    assert found.step not in found.stale_snapshots or found.how != "load"


def test_what_the_own_log_disproves_is_said_so_before_the_log_is_overwritten() -> None:
    """States 6 and 12, and a log that has gone another way from step 8 on."""
    entries = {**log(6, 8), **{step: ref(step, "b") for step in range(8, 13)}}
    holding = Holding(12, (6, 12), entries)
    found = plan(14, KEEP, holding, commits(6, 14))
    assert (found.how, found.step, found.disproved_after) == ("load", 6, 8)
    assert plan(14, KEEP, Holding(12, (6, 12), log(6, 13)), commits(6, 14)).disproved_after is None


def test_what_is_held_is_told() -> None:
    told = held(1, (2, 4), Holding(7, (5,), log(5, 8)))
    assert told == Held(1, 2, 4, 7, 5, 8, first=ref(5), last=ref(6))
    told = held(1, (2, 4), Holding(None, (2, 5), log(4, 8)))
    assert told == Held(1, 2, 4, 5, 4, 8, first=ref(4), last=ref(4))
    assert held(1, (2, 4), Holding(None, (), log(0, 3))) == Held(1, 2, 4, 0, 0, 3, first=ref(0))
    assert held(1, (2, 4), Holding(6)) == Held(1, 2, 4, 6, 6, 6)
    assert held(1, (2, 4), Holding(None, (), log(3, 5))) is None
    assert held(1, (2, 4), Holding(None, (), log(0, 5), starts_itself=False)) is None


def test_two_snapshots_and_the_log_since_the_older_are_kept() -> None:
    assert retained([]) == ((), 0)
    assert retained([10]) == ((10,), 0)
    assert retained([10, 30, 20]) == ((20, 30), 20)
