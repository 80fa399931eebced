"""The solver as the coordinator asks it: a real child, real answers, and a light daemon."""

import asyncio
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from swarmnode.coordinator.measurements import MeasuredLink
from swarmnode.coordinator.solver.fill import solve
from swarmnode.coordinator.solver.request import GridRequest, Improvement, ImproveRequest, Swarm
from swarmnode.coordinator.solving import Solver
from swarmnode.domain import Generation, ModelFacts, PeerId, Plan
from swarmnode.errors import CapacityError
from swarmnode.manifest import BatchConfig, OpenJob, PlacedJob, PlacementConfig, PlacementWish
from tests.coordinator.bench import advert

FACTS = ModelFacts(6, 1_000_000, 50_000, 50_000, 256, 300, 128, False)
BATCH = BatchConfig(rows=4, sequence_length=64, num_microbatches=4)
ME = PeerId("a")


def placed(stages: int = 2, slots: int = 2, min_peers: int = 1, **more: object) -> PlacedJob:
    placement = PlacementConfig(stages=stages, slots=slots, min_peers=min_peers, **more)  # type: ignore[arg-type]
    return PlacedJob(name="j", batch=BATCH, placement=placement)


def running(job: PlacedJob, names: str) -> Plan:
    decision = solve([advert(name) for name in names], FACTS, job)
    return decision.plan(Generation(1), ME, {}, (), (ME,))


def improve(
    swarm: Swarm, job: PlacedJob, plan: Plan, tmp_path: Path, *, serves: bool = False
) -> Improvement:
    request = ImproveRequest(swarm, FACTS, job, plan, serves, calm_s=3600.0)
    return asyncio.run(Solver(tmp_path / "solver.log").improve(request))


def test_work_moves_to_machines_that_have_none_and_the_bound_holds(tmp_path: Path) -> None:
    job = placed()
    plan = running(job, "ab")
    swarm = Swarm(tuple(advert(name) for name in "abcd"))
    found = improve(swarm, job, plan, tmp_path)
    decision = found.decision
    assert {peer for row in decision.slots for peer in row} == {"a", "b", "c", "d"}
    assert decision.layers == plan.layers
    assert decision.bound_s is not None
    assert decision.bound_s <= decision.cost_s < 0.75 * found.current_s
    assert decision.reasons


def test_a_link_that_crawls_is_avoided_and_the_reasons_are_said(tmp_path: Path) -> None:
    job = placed(stages=2, slots=1)
    plan = running(job, "ab")
    slow = tuple(
        MeasuredLink(PeerId(a), PeerId(b), 0.001, 1e4 if {a, b} == {"a", "b"} else 1e9)
        for a in "abc"
        for b in "abc"
        if a != b
    )
    swarm = Swarm(tuple(advert(name) for name in "abc"), slow)
    found = improve(swarm, job, plan, tmp_path)
    assert {row[0] for row in found.decision.slots} != {"a", "b"}, found
    assert found.decision.cost_s < 0.75 * found.current_s


def test_a_plan_of_which_a_host_is_gone_is_repaired_with_what_is_left(tmp_path: Path) -> None:
    job = placed()
    plan = running(job, "abcd")
    found = improve(Swarm(tuple(advert(name) for name in "abc")), job, plan, tmp_path)
    assert found.current_s is None
    assert {peer for row in found.decision.slots for peer in row} <= {"a", "b", "c"}


def test_pins_hold_in_the_search_too(tmp_path: Path) -> None:
    job = placed(pins={PeerId("a"): 1, PeerId("b"): 0})
    found = improve(
        Swarm(tuple(advert(name) for name in "abcd")), job, running(job, "abcd"), tmp_path
    )
    assert "a" not in found.decision.slots[0]
    assert "b" not in found.decision.slots[1]


def test_tokens_take_the_short_way_and_steps_the_wide_one(tmp_path: Path) -> None:
    """From a: b is near behind a thin line, c far behind a thick one."""
    near, far = (0.001, 2e6), (0.2, 1e9)
    links = tuple(
        MeasuredLink(PeerId(x), PeerId(y), *(near if {x, y} == {"a", "b"} else far))
        for x in "abc"
        for y in "abc"
        if x != y
    )
    peers = tuple(advert(name, flops=1e12, memory=8 << 30) for name in "abc")
    swarm = Swarm(peers, links)
    job = placed(slots=1, min_peers=2)
    before = running(job, "ac")
    token = improve(swarm, job, before, tmp_path, serves=True).decision
    assert {row[0] for row in token.slots} == {"a", "b"}
    assert 0.001 < token.cost_s < 0.1
    heavy = BATCH.model_copy(update={"rows": 64, "sequence_length": 512})
    step = improve(swarm, job.model_copy(update={"batch": heavy}), before, tmp_path).decision
    assert PeerId("c") in {row[0] for row in step.slots}


@pytest.mark.parametrize("min_peers", [1, 3])
def test_a_job_spreads_over_as_many_machines_as_it_asks_for(min_peers: int, tmp_path: Path) -> None:
    crawling = tuple(
        MeasuredLink(PeerId(a), PeerId(b), 0.5, 1e3) for a in "abc" for b in "abc" if a != b
    )
    swarm = Swarm(tuple(advert(name) for name in "abc"), crawling)
    job = placed(min_peers=min_peers)
    found = improve(swarm, job, running(job, "abc"), tmp_path)
    assert len({peer for row in found.decision.slots for peer in row}) == min_peers


def decide(wish: PlacementWish, swarm: Swarm, tmp_path: Path) -> PlacementConfig:
    job = OpenJob(name="j", batch=BATCH, placement=wish)
    return asyncio.run(Solver(tmp_path / "solver.log").decide_grid(GridRequest(swarm, FACTS, job)))


def test_what_a_job_leaves_open_is_decided_for_the_machines_that_are_here(tmp_path: Path) -> None:
    room = 140 << 20  # too little for the whole model with its optimizer
    swarm = Swarm(tuple(advert(name, memory=room) for name in "abcd"))
    decided = decide(PlacementWish(), swarm, tmp_path)
    assert decided.stages >= 2
    assert BATCH.num_microbatches % decided.slots == 0
    assert decide(PlacementWish(stages=3, slots=1), swarm, tmp_path).stages == 3


def test_a_much_faster_machine_gets_more_layers_and_equal_ones_equal_layers(tmp_path: Path) -> None:
    wish = PlacementWish(stages=2, slots=1, min_peers=2)
    room = 160 << 20  # for five of the six layers
    uneven = Swarm((advert("a", flops=8e9, memory=room), advert("b", flops=1e9, memory=room)))
    layers = decide(wish, uneven, tmp_path).layers
    assert layers is not None
    assert sorted(layers) != [3, 3]
    assert decide(wish, Swarm((advert("a"), advert("b"))), tmp_path).layers is None


def test_a_machine_that_was_measured_in_a_busy_moment_counts_as_its_like() -> None:
    twin = replace(advert("a", flops=9e9), peer=PeerId("b"))
    slow = replace(twin.device, flops={"float32": 1e9})
    swarm = Swarm((advert("a", flops=9e9), replace(twin, device=slow), advert("c", flops=1e9)))
    assert [peer.device.flops["float32"] for peer in swarm.settled().peers] == [9e9, 9e9, 1e9]
    assert not swarm.settled().is_even("float32")
    assert Swarm(swarm.peers[:2]).settled().is_even("float32")


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    swarm = Swarm(tuple(advert(name, memory=1 << 20) for name in "ab"))
    with pytest.raises(CapacityError) as refusal:
        decide(PlacementWish(stages=2, slots=1), swarm, tmp_path)
    assert "\n" not in str(refusal.value)


def test_the_daemon_loads_neither_the_solver_nor_torch() -> None:
    code = "import sys, swarmnode.daemon; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "swarmnode.coordinator.solver.fill" in loaded
    assert not loaded & {"numba", "scipy", "ortools", "torch", "swarmnode.coordinator.solver.live"}
