"""Promises: never the same generation to two, never down, and nothing below them is served."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmnode.domain import Generation, JobId, PeerId, Plan
from swarmnode.errors import DataError
from swarmnode.messages import (
    Assign,
    Inquire,
)
from swarmnode.worker.tenancy import Tenancy

JOB = JobId("job")
SUBMITTER, SECOND, THIRD = PeerId("submitter"), PeerId("second"), PeerId("third")
FRESH = Tenancy.fresh(JOB, SUBMITTER)


def plan(generation: int, coordinator: PeerId = SUBMITTER) -> Plan:
    return Plan(
        Generation(generation), ((0, 1),), ((PeerId("me"),),), coordinator,
        voters=(SUBMITTER, SECOND),
    )  # fmt: skip


def inquire(generation: int, based_on: int = 0, num_lines: int = 0) -> Inquire:
    return Inquire(JOB, Generation(generation), Generation(based_on), num_lines, b"")


def assign(generation: int, coordinator: PeerId = SUBMITTER) -> Assign:
    return Assign(JOB, plan(generation, coordinator), 0, (), b"")


def ask(
    tenancy: Tenancy, generation: int, sender: PeerId, based_on: int = 0, *, live: bool = False
) -> Tenancy | None:
    return tenancy.on_inquire(inquire(generation, based_on), sender, live)


def adopted(generation: int, coordinator: PeerId = SUBMITTER) -> Tenancy:
    promised = ask(FRESH, generation, coordinator)
    assert promised is not None
    found = promised.on_assign(assign(generation, coordinator), coordinator)
    assert found is not None
    return found


def test_a_higher_generation_is_promised_and_the_same_one_only_to_the_same_peer() -> None:
    first = ask(FRESH, 1, SUBMITTER)
    assert first is not None
    assert (first.promised, first.promised_to, first.adopted) == (1, SUBMITTER, 0)
    assert ask(first, 1, SUBMITTER) == first, "asked again"
    assert ask(first, 1, SECOND) is None
    assert ask(first, 0, SUBMITTER) is None
    second = ask(first, 2, SECOND)
    assert second is not None
    assert ask(second, 1, SUBMITTER) is None
    assert not second.obeys(SUBMITTER)


def test_who_knows_less_is_not_granted() -> None:
    tenancy = adopted(5)
    assert ask(tenancy, 6, SUBMITTER, based_on=4) is None
    assert ask(tenancy, 6, SUBMITTER, based_on=5) is not None
    assert tenancy.on_inquire(inquire(6, 5, num_lines=7), SECOND, False, 8) is None
    assert tenancy.on_inquire(inquire(6, 5, num_lines=8), SECOND, False, 8) is not None


def test_what_a_majority_granted_is_granted_although_we_adopted_a_plan_that_never_began() -> None:
    tenancy = adopted(5)
    agreed = inquire(8, based_on=8, num_lines=7)
    granted = tenancy.on_inquire(agreed, SECOND, False, 9)
    assert granted is not None
    assert (granted.promised, granted.promised_to, granted.adopted) == (8, SECOND, 5)
    assert tenancy.on_inquire(inquire(8, based_on=4, num_lines=7), SECOND, False, 7) is None
    assert tenancy.on_inquire(agreed, SECOND, True, 9) is None, "our coordinator lives"
    assert granted.on_inquire(agreed, THIRD, False, 9) is None, "promised to another"
    assert tenancy.on_inquire(inquire(5, based_on=5), SECOND, False) is None, "not above ours"


def test_the_coordinator_that_is_obeyed_wrote_the_journal_and_may_have_less_of_it() -> None:
    found = adopted(5).on_inquire(inquire(6, 5, num_lines=7), SUBMITTER, False, 8)
    assert found is not None


def test_a_live_coordinator_is_not_replaced_but_may_go_on_itself() -> None:
    tenancy = adopted(1)
    assert ask(tenancy, 2, SECOND, 1, live=True) is None
    assert ask(tenancy, 2, SECOND, 1, live=False) is not None
    assert ask(tenancy, 2, SUBMITTER, 1, live=True) is not None


def test_a_generation_that_is_adopted_is_never_promised_again() -> None:
    assert ask(adopted(3), 3, SUBMITTER, 3) is None


def test_a_job_that_is_over_is_not_begun_again() -> None:
    """Who was away at its end stands for election, and others still know its last plan."""
    let_go = replace(adopted(3), is_released=True)
    again = ask(let_go, 4, SECOND, 3)
    assert again is not None, "who was only let go may take part again"
    over = replace(let_go, is_over=True)
    assert ask(over, 4, SECOND, 3) is None
    assert ask(over, 4, SUBMITTER, 3) is None
    assert over.on_assign(assign(4), SUBMITTER) is None
    assert let_go.on_assign(assign(4), SUBMITTER) is not None
    assert Tenancy.from_json(over.to_json()) == over


def test_only_what_was_promised_is_adopted() -> None:
    promised = ask(FRESH, 2, SECOND)
    assert promised is not None
    assert promised.on_assign(assign(2, SUBMITTER), SUBMITTER) is None
    assert promised.on_assign(assign(3, SUBMITTER), SUBMITTER) is None
    assert promised.on_assign(assign(1, SECOND), SECOND) is None
    assert promised.on_assign(assign(2, SECOND), SUBMITTER) is None, "for another coordinator"
    found = promised.on_assign(assign(2, SECOND), SECOND)
    assert found is not None
    assert (found.adopted, found.coordinator) == (2, SECOND)


def test_the_coordinator_that_is_obeyed_may_go_on_without_a_question() -> None:
    tenancy = adopted(2)
    later = tenancy.on_assign(assign(4), SUBMITTER)
    assert later is not None
    assert (later.promised, later.adopted) == (4, 4)
    assert tenancy.on_assign(assign(4, SECOND), SECOND) is None


def test_an_assignment_that_comes_twice_is_carried_out_once() -> None:
    """It names the step from which its generation began: a second time, steps would be undone."""
    tenancy = adopted(2)
    assert tenancy.on_assign(assign(2), SUBMITTER) is None
    other = replace(assign(2), plan=replace(plan(2), slots=((PeerId("other"),),)))
    assert tenancy.on_assign(other, SUBMITTER) is None


def test_strangers_may_not_ask_and_voters_may() -> None:
    def never(*_: object) -> bool:
        return False

    assert FRESH.may_ask(inquire(1), SUBMITTER)
    assert not FRESH.may_ask(inquire(1), SECOND)
    tenancy = adopted(1)
    assert tenancy.may_ask(inquire(2), SECOND)
    assert not tenancy.may_ask(inquire(2), SECOND, never)
    assert not tenancy.may_ask(inquire(2), THIRD)
    assert tenancy.plan is not None
    before = replace(tenancy, plan=replace(tenancy.plan, voters_before=(THIRD,)))
    assert before.may_ask(inquire(2), THIRD), "the plan may never have begun"
    assert tenancy.may_ask(inquire(2), THIRD, lambda _t, lease, _s, _g: lease == b"")


PEERS = st.sampled_from([SUBMITTER, SECOND, THIRD])
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["inquire", "assign", "restart"]),
        st.integers(0, 6),
        st.integers(0, 6),
        PEERS,
        st.booleans(),
    ),
    max_size=40,
)


@given(EVENTS)
def test_any_interleaving_keeps_every_promise(
    events: list[tuple[str, int, int, PeerId, bool]],
) -> None:
    tenancy = FRESH
    granted: dict[int, PeerId] = {}
    plans: dict[int, Plan] = {}
    for kind, generation, based_on, sender, live in events:
        before = tenancy
        if kind == "restart":
            tenancy = Tenancy.from_json(json.loads(json.dumps(tenancy.to_json())))
            assert tenancy == before
            continue
        if kind == "inquire":
            after = before.on_inquire(inquire(generation, based_on), sender, live)
        else:
            after = before.on_assign(assign(generation, sender), sender)
        if after is None:
            continue
        tenancy = after
        assert generation >= before.promised, "nothing below the promise is granted"
        assert tenancy.promised == generation
        assert granted.setdefault(generation, sender) == sender, "one generation to two peers"
        assert tenancy.adopted >= before.adopted
        if kind == "assign":
            assert plans.setdefault(generation, assign(generation, sender).plan).coordinator == (
                sender
            )
        else:
            assert based_on >= before.adopted
            assert not (live and sender != before.coordinator)
        for lower in range(generation):
            assert not tenancy.accepts(lower)
        assert tenancy.accepts(generation)


@pytest.mark.parametrize("key", ["job", "submitter", "promised", "promised_to", "plan", "lease"])
def test_a_damaged_tenancy_is_refused(key: str) -> None:
    raw = adopted(3).to_json()
    assert Tenancy.from_json(raw) == adopted(3)
    for wrong in (None, 17.5, ["x"]):
        if key == "plan" and wrong is None:
            continue
        with pytest.raises(DataError):
            Tenancy.from_json({**raw, key: wrong})
    with pytest.raises(DataError):
        Tenancy.from_json({k: v for k, v in raw.items() if k != key})
