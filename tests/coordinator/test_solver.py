"""Placement: every slot has a machine, no machine more than it can hold, and nothing moves idly."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmnode.coordinator.cost.needs import machine_bytes, split_layers, stage_needs
from swarmnode.coordinator.solver.decision import Decision
from swarmnode.coordinator.solver.fill import solve
from swarmnode.domain import (
    Advert,
    DeviceSpec,
    Generation,
    Limits,
    ModelFacts,
    PeerId,
    Plan,
    SlotId,
)
from swarmnode.errors import CapacityError, ManifestError
from swarmnode.manifest import BatchConfig, PlacedJob, PlacementConfig

FACTS = ModelFacts(6, 1000, 500, 500, 16, 300, 128, False)
ROOMY = 1 << 30


def advert(name: str, *, flops: float = 1e9, memory: int = ROOMY, device: int = ROOMY) -> Advert:
    return Advert(
        PeerId(name),
        (),
        DeviceSpec("cpu", name, {"float32": flops}, 1e9, device, device, 1),
        Limits(memory, 1),
        "0",
        1,
        0.0,
    )


def job(stages: int, slots: int, *, min_peers: int | None = 1) -> PlacedJob:
    return PlacedJob(
        name="j",
        placement=PlacementConfig(stages=stages, slots=slots, min_peers=min_peers),
        batch=BatchConfig(rows=1, sequence_length=8, num_microbatches=2 * slots),
    )


def plan_of(decision: Decision, generation: int = 1) -> Plan:
    return Plan(
        Generation(generation),
        decision.layers,
        decision.slots,
        PeerId("a"),
        predicted_step_s=decision.cost_s,
    )


def stages_on(decision: Decision, peer: PeerId) -> list[int]:
    return [at.stage for at in plan_of(decision).hosted_by(peer)]


def check_decision(decision: Decision, peers: list[Advert], job: PlacedJob) -> None:
    """What must be true of every placement."""
    assert [len(row) for row in decision.slots] == [job.placement.slots] * job.placement.stages
    needs = stage_needs(FACTS, job, decision.layers)
    by_id = {peer.peer: peer for peer in peers}
    for peer in plan_of(decision).workers():
        room = min(by_id[peer].limits.memory_bytes, by_id[peer].device.memory_total_bytes)
        assert machine_bytes(needs, stages_on(decision, peer)) <= room
    assert 0 < decision.cost_s < float("inf")
    assert decision.bound_s is None
    assert decision.reasons


swarms = st.lists(
    st.tuples(
        st.sampled_from([1e8, 1e9, 3e9, 1e11]), st.integers(0, 400_000), st.integers(0, 400_000)
    ),
    min_size=1,
    max_size=8,
).map(
    lambda rows: [
        advert(f"p{number}", flops=flops, memory=memory, device=device)
        for number, (flops, memory, device) in enumerate(rows)
    ]
)
jobs = st.builds(job, st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=200, deadline=None)
@given(peers=swarms, job=jobs)
def test_every_slot_is_placed_within_every_limit_or_one_line_says_why(
    peers: list[Advert], job: PlacedJob
) -> None:
    try:
        decision = solve(peers, FACTS, job)
    except CapacityError as error:
        says = str(error)
    else:
        check_decision(decision, peers, job)
        assert len(decision.moved) == job.placement.stages * job.placement.slots
        assert solve(list(reversed(peers)), FACTS, job) == decision, "the order of peers counts"
        return
    assert len(says.splitlines()) == 1
    assert "GiB" in says


@settings(max_examples=200, deadline=None)
@given(peers=swarms, job=jobs, data=st.data())
def test_slots_of_live_machines_stay_and_the_rest_is_placed_within_the_limits(
    peers: list[Advert], job: PlacedJob, data: st.DataObject
) -> None:
    try:
        before = plan_of(solve(peers, FACTS, job))
    except CapacityError:
        return
    alive = [peer for peer in peers if data.draw(st.booleans())]
    try:
        decision = solve(alive, FACTS, job, previous=before)
    except CapacityError:
        assert len(alive) < len(peers), "what fitted before fits again"
        return
    check_decision(decision, alive, job)
    names = {peer.peer for peer in alive}
    grid = [SlotId(s, v) for s in range(job.placement.stages) for v in range(job.placement.slots)]
    kept = [at for at in grid if before.host(at) in names]
    after = plan_of(decision)
    assert [after.host(at) for at in kept] == [before.host(at) for at in kept]
    held = {(before.host(at), at.stage) for at in kept}
    needed = [at for at in grid if (after.host(at), at.stage) not in held]
    assert len(decision.moved) == len(set(decision.moved))
    assert set(decision.moved) <= set(needed)
    assert {(after.host(at), at.stage) for at in decision.moved} == {
        (after.host(at), at.stage) for at in needed
    }


def test_when_all_are_alive_nothing_moves() -> None:
    peers = [advert(name) for name in "abcd"]
    before = plan_of(solve(peers, FACTS, job(2, 2)))
    decision = solve([*peers, advert("e")], FACTS, job(2, 2), previous=before)
    assert (decision.slots, decision.moved) == (before.slots, ())
    assert decision.reasons == ("4 of 4 slots stay where they are",)


def test_a_pinned_machine_holds_its_stage_or_nothing() -> None:
    peers = [advert("a", flops=1e12), *(advert(name) for name in "bcd")]
    pinned = job(2, 2)
    placement = pinned.placement.model_copy(update={"pins": {PeerId("a"): 1, PeerId("b"): 0}})
    decision = solve(peers, FACTS, pinned.model_copy(update={"placement": placement}))
    assert PeerId("a") not in decision.slots[0]
    assert PeerId("b") not in decision.slots[1]
    alone = {PeerId("a"): 1, PeerId("b"): 1, PeerId("c"): 1, PeerId("d"): 1}
    placement = pinned.placement.model_copy(update={"pins": alone})
    with pytest.raises(CapacityError):
        solve(peers, FACTS, pinned.model_copy(update={"placement": placement}))


def test_layers_are_split_as_the_job_says_and_only_if_they_are_the_model_s() -> None:
    wanted = job(2, 1)
    placement = wanted.placement.model_copy(update={"layers": (4, 2)})
    uneven = wanted.model_copy(update={"placement": placement})
    assert solve([advert("a")], FACTS, uneven).layers == ((0, 4), (4, 6))
    placement = wanted.placement.model_copy(update={"layers": (4, 4)})
    with pytest.raises(ManifestError, match="does not cut 6 layers into 2 stages"):
        solve([advert("a")], FACTS, wanted.model_copy(update={"placement": placement}))


def test_a_lost_slot_goes_to_an_idle_machine_before_one_at_work() -> None:
    peers = [advert(name) for name in "abcd"]
    before = plan_of(solve(peers, FACTS, job(2, 2)))
    lost = before.slots[1][1]
    left = [peer for peer in peers if peer.peer != lost]
    idle = solve([*left, advert("z", flops=1e6)], FACTS, job(2, 2), previous=before)
    assert idle.slots[1][1] == "z"
    assert idle.moved == (SlotId(1, 1),)
    holder = solve(left, FACTS, job(2, 2), previous=before)
    assert holder.slots[1][1] == before.slots[1][0]
    assert holder.moved == ()


def test_a_plan_of_another_shape_keeps_nothing() -> None:
    peers = [advert(name) for name in "abcd"]
    before = plan_of(solve(peers, FACTS, job(2, 2)))
    for stages, slots in ((3, 2), (2, 1)):
        decision = solve(peers, FACTS, job(stages, slots), previous=before)
        assert len(decision.moved) == stages * slots


def test_every_stage_has_two_holders_where_there_are_machines_for_it() -> None:
    for num_peers in (2, 3, 4, 6, 9):
        peers = [advert(f"p{number}") for number in range(num_peers)]
        for stages in (1, 2, 3, 4):
            for row in solve(peers, FACTS, job(stages, 2)).slots:
                assert len(set(row)) == 2


def test_a_faster_machine_hosts_more() -> None:
    peers = [advert("slow"), advert("fast", flops=3e9)]
    decision = solve(peers, FACTS, job(1, 8))
    assert Counter(decision.slots[0]) == {"fast": 6, "slow": 2}
    even = solve([advert("a"), advert("b")], FACTS, job(1, 8))
    assert Counter(even.slots[0]) == {"a": 4, "b": 4}
    assert decision.cost_s < even.cost_s


def test_the_stage_with_most_work_goes_to_the_fastest_machine() -> None:
    facts = replace(FACTS, num_layers=3)  # the first stage has two of the three layers
    peers = [advert("a"), advert("b", flops=2e9)]
    assert solve(peers, facts, job(2, 1)).slots == ((PeerId("b"),), (PeerId("a"),))


def test_a_machine_that_states_no_speed_still_counts() -> None:
    silent = replace(advert("a"), device=replace(advert("a").device, flops={}))
    assert solve([silent], FACTS, job(2, 1)).slots == ((PeerId("a"),), (PeerId("a"),))


# ---- what cannot be placed ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peers", "wanted", "says"),
    [
        ([], job(1, 1), "0 of 1 peers are here for 1 stages x 1 slots; start more"),
        ([advert("a")], job(2, 1, min_peers=None), "1 of 2 peers are here"),
        ([advert("a")], job(1, 1, min_peers=3), "1 of 3 peers are here"),
        ([advert("a")], job(7, 1), "the model has 6 layers, too few for 7 stages"),
        ([advert("a", memory=10)], job(1, 1), "stage 0 of 1 needs"),
        ([advert("a", device=10)], job(1, 1), "stage 0 of 1 needs"),
    ],
)
def test_what_cannot_be_placed_is_refused_with_what_is_missing(
    peers: list[Advert], wanted: PlacedJob, says: str
) -> None:
    with pytest.raises(CapacityError) as caught:
        solve(peers, FACTS, wanted)
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_one_byte_less_than_a_machine_needs_is_too_little() -> None:
    wanted = job(1, 1)
    (need,) = stage_needs(FACTS, wanted, split_layers(6, 1))
    exact = need.state_bytes + need.slot_bytes
    assert solve([advert("a", memory=exact)], FACTS, wanted).slots == ((PeerId("a"),),)
    with pytest.raises(CapacityError):
        solve([advert("a", memory=exact - 1)], FACTS, wanted)


def test_a_machine_with_a_lower_limit_than_before_is_not_overfilled() -> None:
    wanted = job(2, 1)
    before = plan_of(solve([advert("a")], FACTS, wanted))
    needs = stage_needs(FACTS, wanted, before.layers)
    peers = [advert("a", memory=machine_bytes(needs, [0])), advert("b")]
    check_decision(solve(peers, FACTS, wanted, previous=before), peers, wanted)
