"""The simulated step: exact where a hand can count it, and near the closed form everywhere."""

import time

import numpy as np
import pytest

from swarmnode.coordinator.cost import training
from swarmnode.coordinator.cost.needs import Workload, split_layers
from swarmnode.coordinator.cost.simulate import Simulation, simulate_step
from swarmnode.coordinator.cost.step_formula import Tables
from swarmnode.coordinator.objective import Arrangement
from swarmnode.coordinator.topology import Topology
from tests.coordinator.training_instances import lan, plain_devices, plain_work, random_case


def tables(
    work: Workload, stages: int, slots: int, *speeds: float, topology: Topology | None = None
) -> Tables:
    """Tables whose updates cost nothing, so that a hand can count."""
    topology = topology or lan(len(speeds))
    made = training.tables_of(topology, plain_devices(*speeds), work, stages, slots)
    return made._replace(per_weight=made.per_weight * 0.0)


def arranged(*rows: tuple[int, ...], num_layers: int) -> Arrangement:
    return Arrangement(rows, split_layers(num_layers, len(rows)))


@pytest.mark.parametrize("m", [1, 3, 8])
def test_one_stage_takes_its_work(m: int) -> None:
    step_s = simulate_step(arranged((0,), num_layers=2), tables(plain_work(2, m), 1, 1, 0.5))
    assert step_s == pytest.approx(4.0 * m)


@pytest.mark.parametrize("stages", [2, 3, 5])
@pytest.mark.parametrize("m", [1, 4, 9])
def test_even_stages_without_a_network_take_m_plus_s_minus_1_microbatches(
    stages: int, m: int
) -> None:
    work = tables(plain_work(stages, m), stages, 1, *[1.0] * stages)
    rows = [(s,) for s in range(stages)]
    assert simulate_step(arranged(*rows, num_layers=stages), work) == pytest.approx(m + stages - 1)


def test_slots_of_one_machine_share_it_and_send_nothing() -> None:
    one = tables(plain_work(4, 8, activation_bytes=1e9), 2, 2, 1.0)
    assert simulate_step(arranged((0, 0), (0, 0), num_layers=4), one) == pytest.approx(32.0)
    two = tables(plain_work(4, 8), 2, 2, 1.0, 1.0)
    columns = simulate_step(arranged((0, 1), (0, 1), num_layers=4), two)
    assert columns == pytest.approx(16.0)


def test_a_slow_link_paces_the_pipeline() -> None:
    """Frames of 10 s a way, one after the other: S = 2 with 2 in flight at stage 0."""
    work = plain_work(2, 6, layer_flops=3e-6, activation_bytes=10.0)
    slow = tables(work, 2, 1, 1.0, 1.0, topology=lan(2, bytes_per_s=1.0))
    rows = arranged((0,), (1,), num_layers=2)
    # There and back is 20 s; two microbatches in flight, so one round trip for each two.
    assert simulate_step(rows, slow) == pytest.approx(70.0, rel=1e-5)
    fast = tables(work, 2, 1, 1.0, 1.0, topology=lan(2, bytes_per_s=1e9))
    assert simulate_step(rows, fast) < 1e-3


def test_microbatches_ahead_pay_latency_less_often() -> None:
    """Two in flight take three round trips of 10 s for six microbatches, four take two."""
    steps = []
    for ahead in (0, 2):
        work = plain_work(2, 6, layer_flops=3e-6, ahead=ahead)
        late = tables(work, 2, 1, 1.0, 1.0, topology=lan(2, latency_s=5.0))
        steps.append(simulate_step(arranged((0,), (1,), num_layers=2), late))
    assert steps == pytest.approx([30.0, 20.0], rel=1e-3)


def test_latency_is_paid_once_a_round_trip_of_the_window() -> None:
    work = plain_work(2, 4, layer_flops=0.003)
    late = tables(work, 2, 1, 1.0, 1.0, topology=lan(2, latency_s=5.0))
    step_s = simulate_step(arranged((0,), (1,), num_layers=2), late)
    assert step_s == pytest.approx(20.0, abs=0.05)  # 4 microbatches, 2 at a time, 10 s each time


def test_a_reduction_of_two_takes_a_share_and_a_sum() -> None:
    work = plain_work(1, 2, layer_flops=1.0, layer_weights=100, gradient_bytes_per_weight=4.0)
    pair = tables(work, 1, 2, 1.0, 1.0, topology=lan(2, bytes_per_s=100.0, latency_s=0.5))
    # 1 s of work, half of 400 bytes to the other, half of the sum back: 2 + 2 s, latency twice.
    assert simulate_step(arranged((0, 1), num_layers=1), pair) == pytest.approx(6.0)
    assert simulate_step(arranged((0, 0), num_layers=1), pair) == pytest.approx(2.0)


def test_a_rarer_or_later_reduction_costs_less() -> None:
    work = {"layer_weights": 100, "gradient_bytes_per_weight": 4.0}
    row = arranged((0, 1), num_layers=1)

    def step_s(**more: int) -> float:
        made = plain_work(1, 2, **work, **more)
        return simulate_step(row, tables(made, 1, 2, 1.0, 1.0, topology=lan(2, bytes_per_s=100.0)))

    assert step_s() == pytest.approx(5.0)
    assert step_s(reduce_every=4) == pytest.approx(2.0)
    assert step_s(staleness=1) == pytest.approx(4.0)


def test_a_missing_link_takes_for_ever() -> None:
    topology = lan(2)
    topology.bytes_per_s[0, 1] = 0.0
    work = plain_work(2, 2, activation_bytes=1.0)
    cut = tables(work, 2, 1, 1.0, 1.0, topology=topology)
    assert simulate_step(arranged((0,), (1,), num_layers=2), cut) == float("inf")


@pytest.mark.parametrize("seed", range(20))
def test_everything_is_done_once(seed: int) -> None:
    arrangement, made = random_case(seed)
    simulation = Simulation(arrangement, made)
    assert 0.0 < simulation.run() < float("inf")
    assert set(simulation.num_backward) == {made.num_microbatches}
    assert set(simulation.num_forward) == {made.num_microbatches}
    assert {left for group in simulation.groups for left in group[3]} == {0}


def test_the_closed_form_is_near_the_simulation() -> None:
    """Over random swarms, bound by anything: half within 5 %, 95 of 100 within 25 %."""
    ratios = []
    for seed in range(200):
        arrangement, made = random_case(seed)
        closed = training.step_of(*training.grid_of(arrangement), made).total_s
        ratios.append(closed / simulate_step(arrangement, made))
    off = np.abs(np.log(ratios))
    assert np.median(off) < np.log(1.06)
    assert np.quantile(off, 0.95) < np.log(1.25)
    assert off.max() < np.log(2.0)
    assert 0.95 < np.median(ratios) < 1.05, "no leaning to either side"


def test_the_largest_usual_step_is_simulated_in_time() -> None:
    work = plain_work(8, 64, activation_bytes=1e3, gradient_bytes_per_weight=4.0)
    made = tables(work, 8, 8, *[1.0] * 64)
    rows = arranged(*[tuple(range(8 * s, 8 * s + 8)) for s in range(8)], num_layers=8)
    simulate_step(rows, made)
    started_s = time.process_time()
    simulate_step(rows, made)
    assert time.process_time() - started_s < 0.1, "about 6 ms on an idle core"
