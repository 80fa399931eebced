"""The price of a training step: parts that add up, memory that is counted, cases by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from swarmnode.compression.codec import get_codec
from swarmnode.coordinator.cost import step_formula as on
from swarmnode.coordinator.cost.needs import (
    COMPUTE_EFFICIENCY,
    machine_bytes,
    ranges_of,
    split_layers,
    workload_of,
)
from swarmnode.coordinator.cost.training import (
    Device,
    devices_of,
    grid_of,
    price_of,
    step_of,
    tables_of,
)
from swarmnode.coordinator.objective import NOBODY, Arrangement, Price
from swarmnode.coordinator.topology import Topology, make_topology
from swarmnode.domain import Advert, DeviceSpec, Limits, ModelFacts, PeerId
from swarmnode.errors import DataError
from swarmnode.manifest import BatchConfig, CodecConfig, JobBase, RunConfig
from tests.coordinator.training_instances import (
    lan,
    llama_like,
    plain_devices,
    plain_work,
    random_case,
    uneven_devices,
)

FACTS = ModelFacts(6, 1000, 500, 520, 16, 300, 128, tied=False)
JOB = JobBase(
    name="j",
    batch=BatchConfig(rows=2, sequence_length=8, num_microbatches=8),
    codecs=CodecConfig(activation="int8", activation_gradient="bf16", gradient="none"),
)


def priced(arrangement: Arrangement, tables: on.Tables) -> Price:
    return price_of(step_of(*grid_of(arrangement), tables), tables.num_microbatches)


def arranged(*rows: tuple[int, ...], num_layers: int) -> Arrangement:
    return Arrangement(rows, split_layers(num_layers, len(rows)))


# ---- what a job asks ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "codec", ["none", "bf16", "int8", "int4/32", "topk64of4096/int4", "powersgd/r4"]
)
def test_the_wire_share_is_what_the_codec_sends(codec: str) -> None:
    gradient = codec if codec != "powersgd/r4" else "none"  # it codes no flat gradients
    codecs = CodecConfig(activation=codec, activation_gradient="none", gradient=gradient)
    work = workload_of(FACTS, JOB.model_copy(update={"codecs": codecs}))
    boundary = torch.randn(2, 8, 16)  # rows, positions, width
    sent = get_codec(codec).encode(boundary)
    assert work.activation_share == len(sent) / (4 * boundary.numel())
    assert work.activation_gradient_share == 1
    vector = (1 << 20,)
    assert work.gradient_share == get_codec(gradient).wire_bytes(vector) / (4 << 20)


def test_a_job_becomes_a_workload() -> None:
    work = workload_of(FACTS, JOB)
    assert work.num_microbatches == 8
    assert work.activation_bytes == 4 * 16 * 16
    assert work.layer_flops == 6 * 1000 * 16 + 12 * 8 * 16 * 16
    assert work.last_flops == 6 * 520 * 16
    assert (work.activation_share, work.activation_gradient_share) == (0.25390625, 0.5)
    tied = workload_of(replace(FACTS, tied=True), JOB)
    assert tied.last_flops == 6 * (520 + 500) * 16
    serving = workload_of(FACTS, JOB.model_copy(update={"run": RunConfig(steps=0)}))
    (need,) = serving.needs(((0, 6),), 1)
    assert (need.state_bytes, need.slot_bytes) == (4 * need.weights, 0)


def test_caches_of_hidden_states_need_memory_where_training_keeps_them_there() -> None:
    def cache_bytes(steps: int = 10, **codecs: object) -> int:
        asked = {"codecs": CodecConfig(**codecs), "run": RunConfig(steps=steps)}  # type: ignore[arg-type]
        return workload_of(FACTS, JOB.model_copy(update=asked)).cache_bytes

    assert cache_bytes(activation="aq/int4/32") == 1 << 30
    assert cache_bytes(activation="aq/int4/32", delta_cache_bytes=5000) == 5000
    assert cache_bytes(activation="aq/int4/32", delta_cache_on_disk=True) == 0
    assert cache_bytes(activation="aq/int4/32", steps=0) == 0
    assert cache_bytes(activation="int4/32") == 0


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_stages_together_hold_the_model(stages: int, is_tied: bool) -> None:
    work = workload_of(replace(FACTS, tied=is_tied), JOB)
    held = sum(need.weights for need in work.needs(split_layers(6, stages), 2))
    copies = 500 if is_tied and stages > 1 else 0
    assert held == 6 * 1000 + 500 + 520 + copies


def advert(name: str, flops: dict[str, float], memory: int, device: int) -> Advert:
    spec = DeviceSpec("cpu", name, flops, 1e9, device, device, 1)
    return Advert(PeerId(name), (), spec, Limits(memory, 1), "0", 1, 0.0)


def test_a_device_has_its_dtypes_speed_and_the_smaller_of_two_limits() -> None:
    adverts = [
        advert("a", {"float32": 1e9, "bfloat16": 5e9}, 7, 9),
        advert("b", {"bfloat16": 3e9}, 9, 8),
        advert("c", {}, 1, 1),
    ]
    found = devices_of(adverts, JOB, {PeerId("b"): 2e8})
    assert [d.flops for d in found] == [COMPUTE_EFFICIENCY * 1e9, 2e8, 1.0]
    assert [d.room_bytes for d in found] == [7, 8, 1]
    assert devices_of(adverts, JOB)[1].flops == COMPUTE_EFFICIENCY * 3e9


# ---- the closed form ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_the_parts_add_up_and_memory_is_what_machine_bytes_says(seed: int) -> None:
    arrangement, tables = random_case(seed)
    price = priced(arrangement, tables)
    names = ("ramp_s", "steady_s", "reduction_s", "apply_s", "overhead_s")
    assert sum(price.parts[name] for name in names) == pytest.approx(price.total_s)
    assert 0.0 <= price.parts["bubble_share"] < 1.0
    assert price.parts["compute_s"] <= price.total_s


@pytest.mark.parametrize("is_tied", [False, True])
def test_memory_is_what_machine_bytes_says(is_tied: bool) -> None:
    work = replace(
        llama_like(hidden=256, num_microbatches=8),
        tied=is_tied, last_kept_bytes=77, cache_bytes=1 << 20,
    )  # fmt: skip
    arrangement = arranged((0, 1), (0, 0), (2, 0), num_layers=32)
    tables = tables_of(lan(3), plain_devices(1.0, 1.0, 1.0), work, 3, 2)
    step = step_of(*grid_of(arrangement), tables)
    needs = work.needs(arrangement.layers, 2)
    for node, hosted in ((0, [0, 1, 1, 2]), (1, [0]), (2, [2])):
        assert step.machine[on.USED, node] == machine_bytes(needs, hosted)
    exact = machine_bytes(needs, [0, 1, 1, 2])
    bare = replace(work, cache_bytes=0).needs(arrangement.layers, 2)
    assert exact - machine_bytes(bare, [0, 1, 1, 2]) == 6 << 20, "an end, two of two, an end"
    for room, fits in ((exact, True), (exact - 1, False)):
        devices = [Device(1.0, 1.0, room), *plain_devices(1.0, 1.0)]
        assert step_of(*grid_of(arrangement), tables_of(lan(3), devices, work, 3, 2)).fits is fits


def test_pipelines_without_a_network_take_m_plus_s_minus_1() -> None:
    tables = tables_of(lan(4), plain_devices(*[1.0] * 4), plain_work(4, 9), 4, 1)
    price = priced(arranged((0,), (1,), (2,), (3,), num_layers=4), tables)
    assert price.total_s == pytest.approx(12.0)
    assert price.parts["period_s"] == pytest.approx(1.0)


def test_twice_the_slots_take_twice_the_time() -> None:
    work = plain_work(2, 16)
    fast = tables_of(lan(2), plain_devices(2.0, 1.0), work, 1, 4)
    assert priced(arranged((0, 0, 0, 0), num_layers=2), fast).parts["compute_s"] == 16.0
    assert priced(arranged((0, 0, 0, 1), num_layers=2), fast).parts["compute_s"] == 12.0
    assert priced(arranged((0, 0, 1, 1), num_layers=2), fast).parts["compute_s"] == 16.0


def test_what_stays_on_a_machine_is_free_and_what_leaves_costs_its_link() -> None:
    work = plain_work(2, 4, layer_flops=1e-6, activation_bytes=50.0, activation_share=0.5)
    tables = tables_of(lan(2, bytes_per_s=10.0), plain_devices(1.0, 1.0), work, 2, 1)
    assert priced(arranged((0,), (0,), num_layers=2), tables).total_s < 1e-4
    price = priced(arranged((0,), (1,), num_layers=2), tables)
    assert price.parts["transfer_s"] == pytest.approx(4 * 5.0)  # the way back is not coded
    links = replace(work, activation_share=np.array([[1.0, 0.1], [1.0, 1.0]]))
    tables = tables_of(lan(2, bytes_per_s=10.0), plain_devices(1.0, 1.0), links, 2, 1)
    assert tables.forward_out_s[0, 1] == pytest.approx(0.5)
    assert tables.forward_out_s[1, 0] == pytest.approx(5.0)


def test_one_way_links_are_priced_one_way() -> None:
    topology = lan(2, bytes_per_s=100.0)
    topology.bytes_per_s[1, 0] = 1.0
    work = plain_work(2, 1, layer_flops=1e-6, activation_bytes=100.0)
    tables = tables_of(topology, plain_devices(1.0, 1.0), work, 2, 1)
    assert priced(arranged((0,), (1,), num_layers=2), tables).total_s == pytest.approx(101.0)
    topology.bytes_per_s[1, 0] = 0.0
    tables = tables_of(topology, plain_devices(1.0, 1.0), work, 2, 1)
    assert priced(arranged((0,), (1,), num_layers=2), tables).total_s == float("inf")
    assert priced(arranged((0,), (0,), num_layers=2), tables).total_s < 1.0


def test_an_uplink_of_its_own_caps_every_link_of_a_machine() -> None:
    work = plain_work(2, 1, activation_bytes=100.0)
    devices = [Device(1.0, 1e9, 1e9, uplink_bytes_per_s=4.0), Device(1.0, 1e9, 1e9)]
    tables = tables_of(lan(2, bytes_per_s=50.0), devices, work, 2, 1)
    assert tables.forward_out_s[0, 1] == 25.0
    assert tables.backward_out_s[1, 0] == 2.0


def test_a_slow_memory_bounds_a_fast_processor() -> None:
    work = plain_work(1, 1, touched_bytes_per_weight=10.0)
    tables = tables_of(lan(1), [Device(1e9, 2.0, 1e9)], work, 1, 1)
    step = step_of(*grid_of(arranged((0,), num_layers=1)), tables)
    assert step.machine[on.COMPUTE_S, 0] == 5.0


def test_a_reduction_costs_what_crosses_the_wire_less_often_and_beside_the_next_step() -> None:
    row = arranged((0, 1), num_layers=1)

    def reduction_s(**more: object) -> float:
        values = {"layer_weights": 100, "gradient_bytes_per_weight": 4.0, **more}
        work = plain_work(1, 2, **values)
        tables = tables_of(lan(2, bytes_per_s=100.0), plain_devices(1.0, 1.0), work, 1, 2)
        return priced(row, tables).parts["reduction_s"]

    assert reduction_s() == pytest.approx(4.0)
    assert reduction_s(gradient_share=0.25) == pytest.approx(1.0)
    assert reduction_s(reduce_every=4) == pytest.approx(1.0)
    assert reduction_s(staleness=1) == pytest.approx(3.0)
    assert reduction_s(staleness=1, layer_flops=5.0) == 0.0


def test_a_tied_embedding_is_reduced_between_both_ends() -> None:
    values = {"layer_weights": 1, "first_weights": 1000, "gradient_bytes_per_weight": 4.0}
    grid = arranged((0,), (1,), num_layers=2)

    def reduction_s(*, tied: bool) -> float:
        work = plain_work(2, 1, tied=tied, **values)
        tables = tables_of(lan(2, bytes_per_s=1e3), plain_devices(1.0, 1.0), work, 2, 1)
        return priced(grid, tables).parts["reduction_s"]

    assert reduction_s(tied=False) == 0.0
    assert reduction_s(tied=True) == pytest.approx(4.0)


def test_the_coordinator_costs_one_round_trip_of_the_farthest_host() -> None:
    latency = np.array([[0.0, 1.0, 7.0], [2.0, 0.0, 1.0], [7.0, 1.0, 0.0]])
    topology = make_topology(["a", "b", "c"], latency, np.full((3, 3), 1e9))
    work = plain_work(1, 1)
    tables = tables_of(topology, plain_devices(1.0, 1.0, 1.0), work, 1, 1, coordinator=0)
    for host, wait_s in ((0, 0.0), (1, 3.0), (2, 14.0)):
        price = priced(Arrangement(((host,),), ((0, 1),)), tables)
        assert price.parts["overhead_s"] == wait_s


@pytest.mark.parametrize("seed", range(10))
def test_a_faster_network_never_hurts(seed: int) -> None:
    work = llama_like(hidden=1024, num_microbatches=16)
    random = np.random.default_rng(seed)
    devices = [replace(device, room_bytes=1e12) for device in uneven_devices(8, seed)]
    rows = random.integers(0, 8, (4, 4)).tolist()
    arrangement = Arrangement(tuple(map(tuple, rows)), ranges_of([8] * 4))
    costs = []
    for rate in (1e6, 1e7, 1e8, 1e9):
        tables = tables_of(lan(8, bytes_per_s=rate, latency_s=0.01), devices, work, 4, 4)
        costs.append(priced(arrangement, tables).total_s)
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]


# ---- what makes no sense -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "devices", "slots", "says"),
    [
        (lan(2), plain_devices(1.0), 1, "1 devices for 2 nodes"),
        (lan(1), plain_devices(0.0), 1, "node 0 has no speed"),
        (lan(1), plain_devices(float("nan")), 1, "node 0 has no speed"),
        (lan(1), plain_devices(1.0), 3, "4 microbatches do not divide into 3 pipelines"),
    ],
)
def test_nonsense_is_refused_in_one_line(
    topology: Topology, devices: list[Device], slots: int, says: str
) -> None:
    with pytest.raises(DataError, match=says):
        tables_of(topology, devices, plain_work(2, 4), 1, slots)


def test_a_grid_with_holes_has_no_price() -> None:
    with pytest.raises(DataError, match="has no host"):
        grid_of(Arrangement(((NOBODY,),), ((0, 1),)))
    with pytest.raises(DataError, match="one row of equal length"):
        grid_of(Arrangement((), ()))
