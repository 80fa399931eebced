"""The `training` cost: predicted seconds of one step on uneven machines, and what they are made of.

The model is our engine's own step: 1F1B with S - s microbatches in flight at stage s, one unit of
work at a time on each machine whatever it hosts, frames that leave a machine one after the other
while it computes, then every slot's share of each shard to its owner and the sums back.
`step_formula` has the formulas, `simulate` the same step event by event.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from swarmnode.coordinator.cost import step_formula as on
from swarmnode.coordinator.cost.needs import Workload, effective_flops, workload_of
from swarmnode.coordinator.cost.step_formula import Floats, Ints, Tables
from swarmnode.coordinator.objective import NOBODY, Arrangement, Price
from swarmnode.coordinator.topology import LOCAL_BYTES_PER_S, Topology
from swarmnode.domain import Advert, PeerId
from swarmnode.errors import DataError
from swarmnode.manifest import JobBase

__all__ = [
    "Device", "Step", "Workload", "devices_of", "price_of", "step_of", "tables_of", "workload_of",
]  # fmt: skip

HASH_BYTES_PER_S = 1.5e9
"""SHA-256 on one core of a recent machine."""
HASHED_BYTES_PER_WEIGHT = 8
"""The reduced gradient before Ready, the weights after the commit."""
APPLIED_BYTES_PER_WEIGHT = 60
"""Memory traffic: shares coded, decoded and summed, then AdamW over weight, gradient, moments."""


@dataclass(frozen=True)
class Device:
    """What one machine can do for a job."""

    flops: float
    """Effective FLOP/s in the job's precision."""
    memory_bytes_per_s: float
    room_bytes: float
    """Most memory that the job may use."""
    uplink_bytes_per_s: float | None = None
    """All that it sends together; the fastest link that it has, unless known."""
    downlink_bytes_per_s: float | None = None


def devices_of(
    adverts: Sequence[Advert], job: JobBase, reached: Mapping[PeerId, float] | None = None
) -> list[Device]:
    """What each advertised machine can do for `job`; `reached` has FLOP/s seen in real steps."""
    seen = reached or {}
    return [
        Device(
            flops=seen.get(advert.peer) or effective_flops(advert, job),
            memory_bytes_per_s=advert.device.memory_bytes_per_s,
            room_bytes=min(advert.limits.memory_bytes, advert.device.memory_total_bytes),
        )
        for advert in adverts
    ]


def tables_of(
    topology: Topology,
    devices: Sequence[Device],
    workload: Workload,
    stages: int,
    slots: int,
    *,
    coordinator: int | None = None,
    pins: Mapping[int, int] | None = None,
    min_nodes: int = 1,
) -> Tables:
    """Everything that the formula reads. `pins` maps a node to the only stage that it may host;
    at least `min_nodes` must host something.

    Raises: DataError for numbers that make no sense, naming them.
    """
    count = topology.num_nodes
    _check(count, devices, workload, stages, slots)
    down, rate = _wires(topology, devices)
    with np.errstate(divide="ignore"):
        out_s, in_s = 1.0 / rate, np.where(rate > 0, 1.0 / down[None, :], np.inf)
    for seconds in (out_s, in_s):
        np.fill_diagonal(seconds, 0.0)

    def frames(num_bytes: float, share: float | Floats) -> tuple[Floats, Floats]:
        size = np.broadcast_to(num_bytes * np.asarray(share, dtype=np.float64), (count, count))
        with np.errstate(invalid="ignore"):
            return tuple(np.nan_to_num(size * s, nan=0.0, posinf=np.inf) for s in (out_s, in_s))  # type: ignore[return-value]

    forward = frames(workload.activation_bytes, workload.activation_share)
    backward = frames(workload.activation_bytes, workload.activation_gradient_share)
    reduce_bytes = workload.gradient_bytes_per_weight
    if workload.gathers:
        reduce_bytes *= slots / 2  # the formula counts two shards for each other slot, not `slots`
    reduce = frames(reduce_bytes, workload.gradient_share)
    wait_s = np.zeros(count)
    if coordinator is not None:
        both_ways_s = topology.latency_s[:, coordinator] + topology.latency_s[coordinator, :]
        wait_s = both_ways_s / max(1, workload.reduce_every)
    is_allowed = np.ones((count, stages), dtype=np.bool_)
    for node, stage in (pins or {}).items():
        is_allowed[node] = np.arange(stages) == stage
    per_layer, at_end, tied_weights, per_weight = _work(workload)
    return Tables(
        1.0 / np.array([d.flops for d in devices], dtype=np.float64),
        1.0 / np.array([d.memory_bytes_per_s for d in devices], dtype=np.float64),
        np.array([d.room_bytes for d in devices], dtype=np.float64),
        np.ascontiguousarray(topology.latency_s),
        *forward,
        *backward,
        *reduce,
        is_allowed,
        np.ascontiguousarray(wait_s),
        per_layer,
        at_end,
        tied_weights,
        per_weight,
        workload.num_microbatches // slots,
        workload.backward_share,
        float(workload.reduce_every),
        workload.staleness,
        min_nodes,
        workload.ahead,
        float(workload.cache_bytes),
    )


def _check(
    count: int, devices: Sequence[Device], workload: Workload, stages: int, slots: int
) -> None:
    if len(devices) != count:
        raise DataError(f"{len(devices)} devices for {count} nodes; give one for each")
    for node, device in enumerate(devices):
        if not (0 < device.flops < np.inf and 0 < device.memory_bytes_per_s < np.inf):
            raise DataError(f"node {node} has no speed; give FLOP/s and memory bandwidth above 0")
    if stages < 1 or slots < 1 or workload.num_microbatches % slots:
        raise DataError(
            f"{workload.num_microbatches} microbatches do not divide into {slots} pipelines of "
            f"{stages} stages; choose slots that divide them"
        )
    if workload.reduce_every < 1 or workload.staleness not in (0, 1):
        raise DataError("reduce_every is at least 1, staleness 0 or 1")


def _wires(topology: Topology, devices: Sequence[Device]) -> tuple[Floats, Floats]:
    """The downlink (N,) of each machine, and what each link carries alone (N, N)."""
    links = topology.bytes_per_s.copy()
    np.fill_diagonal(links, 0.0)
    fastest = np.maximum(links.max(axis=0), links.max(axis=1))
    fastest[fastest <= 0] = LOCAL_BYTES_PER_S
    up, down = fastest.copy(), fastest.copy()
    for node, device in enumerate(devices):
        up[node] = device.uplink_bytes_per_s or up[node]
        down[node] = device.downlink_bytes_per_s or down[node]
    return down, np.minimum(links, np.minimum(up[:, None], down[None, :]))


def _work(workload: Workload) -> tuple[Floats, Floats, float, Floats]:
    touched = workload.touched_bytes_per_weight

    def row(flops: float, kept: float, weights: float) -> list[float]:
        return [flops, weights * touched, kept, weights]

    own_first = 0.0 if workload.tied else float(workload.first_weights)
    per_layer = row(workload.layer_flops, workload.kept_bytes_per_layer, workload.layer_weights)
    at_end = [
        row(workload.first_flops, 0.0, own_first),
        row(workload.last_flops, workload.last_kept_bytes, workload.last_weights),
    ]
    hash_s = HASHED_BYTES_PER_WEIGHT / HASH_BYTES_PER_S
    applies = workload.gradient_bytes_per_weight > 0.0
    per_weight = [
        workload.state_bytes_per_weight,
        workload.slot_bytes_per_weight,
        hash_s if applies else 0.0,
        APPLIED_BYTES_PER_WEIGHT if applies else 0.0,
    ]
    return (
        np.array(per_layer),
        np.array(at_end),
        float(workload.first_weights) if workload.tied else 0.0,
        np.array(per_weight, dtype=np.float64),
    )


@dataclass(frozen=True, eq=False)
class Step:
    """One priced step with everything the formula found; the rows are `step_formula`'s."""

    fits: bool
    stage: Floats
    machine: Floats
    column: Floats
    seconds: Floats

    @property
    def total_s(self) -> float:
        return float(self.seconds[on.TOTAL_S]) if self.fits else float("inf")


def grid_of(arrangement: Arrangement) -> tuple[Ints, Ints]:
    """Hosts (S, V) and number of layers (S,). Raises: DataError if the grid has holes."""
    grid = np.array(arrangement.slots, dtype=np.int64)
    if grid.ndim != 2 or grid.size == 0 or len(arrangement.layers) != len(grid):
        raise DataError("a placement for training has one row of equal length for each stage")
    if (grid == NOBODY).any():
        raise DataError("a slot of the placement has no host")
    return grid, np.array([stop - start for start, stop in arrangement.layers], dtype=np.int64)


def step_of(grid: Ints, counts: Ints, tables: Tables) -> Step:
    """Price a grid of hosts with these numbers of layers."""
    num_stages, num_slots = grid.shape
    stage = np.zeros((on.NUM_STAGE_ROWS, num_stages))
    machine = np.zeros((on.NUM_MACHINE_ROWS, tables.flop_s.shape[0]))
    column = np.zeros((on.NUM_COLUMN_ROWS, num_slots))
    seconds = np.full(on.NUM_STEP_PLACES, np.inf)
    on.fill_stages(counts, tables, stage)
    fits = on.fill_machines(grid, tables, stage, machine)
    loads = machine[[on.OUT_S, on.IN_S]]
    if fits and np.isfinite(loads).all():
        on.fill_columns(grid, tables, stage, machine, column)
        latency_s = np.zeros(num_stages)
        for s in range(num_stages):
            latency_s[s] = on.add_reduction(grid[s], stage[on.OWN_WEIGHTS, s], tables, machine)
        if tables.tied_weights > 0.0 and num_stages > 1:
            ends = np.concatenate((grid[0], grid[-1]))
            both = on.add_reduction(ends, tables.tied_weights, tables, machine)
            latency_s[0], latency_s[-1] = max(latency_s[0], both), max(latency_s[-1], both)
        on.sum_up(grid, tables, stage, machine, column, latency_s, seconds)
    return Step(fits, stage, machine, column, seconds)


def price_of(step: Step, num_microbatches: int) -> Price:
    """The price with its parts; ramp, steady, reduction, apply and overhead add up to the total.

    `num_microbatches` are those of one pipeline.
    """
    if not np.isfinite(step.total_s):
        return Price(float("inf"), {"fits": float(step.fits)})
    slowest = int(step.column[on.END_S].argmax())
    ramp, end = (float(step.column[row, slowest]) for row in (on.RAMP_S, on.END_S))
    compute = num_microbatches * float(step.machine[on.COMPUTE_S].max())
    wire = num_microbatches * float(step.machine[[on.OUT_S, on.IN_S]].max())
    total = step.total_s
    return Price(
        total,
        {
            "ramp_s": ramp,
            "steady_s": end - ramp,
            "reduction_s": float(step.seconds[on.REDUCTION_S]),
            "apply_s": float(step.seconds[on.APPLIED_S]),
            "overhead_s": float(step.seconds[on.WAIT_S]),
            "period_s": float(step.column[on.PERIOD_S, slowest]),
            "compute_s": compute,
            "transfer_s": wire,
            "bubble_share": max(0.0, 1.0 - compute / total) if total else 0.0,
        },
    )
