"""A training instance: machines, a model and a batch; the grid may be left open."""

from dataclasses import replace

from pydantic import ValidationError

from swarmnode.coordinator.objective import Effort, Objective
from swarmnode.coordinator.planning.inputs import Machine
from swarmnode.coordinator.planning.loads import training_loads
from swarmnode.coordinator.planning.problem import (
    BYTES_PER_STATE_WEIGHT,
    Problem,
    Seeded,
    Wanted,
    check_split,
    machines_of,
    previous_of,
    stage_pins,
)
from swarmnode.coordinator.topology import Topology
from swarmnode.errors import DataError, ManifestError
from swarmnode.manifest import BatchConfig, JobBase

DEFAULT_MICROBATCHES = 64
DEFAULT_SEQUENCE = 2048


def training_problem(
    wanted: Wanted,
    whole: Topology,
    topology: Topology,
    nodes: tuple[int, ...],
    grid: tuple[int | None, int | None],
    effort: Effort,
) -> Problem:
    """TrainingObjective over devices, model and batch; a grid left open is searched for.

    Raises: CapacityError, DataError or ManifestError with one line.
    """
    from swarmnode.coordinator.cost.training import Device, workload_of
    from swarmnode.coordinator.solver.training.objective import TrainingObjective
    from swarmnode.coordinator.solver.training.shape import choose_shape

    assert wanted.model is not None
    machines = machines_of(wanted, whole.names, nodes)
    devices = [Device(m.flops, m.memory_bytes_per_s, m.memory_bytes) for m in machines]
    job = job_of(wanted, grid[1])
    workload = workload_of(wanted.model, job)
    stages, slots = grid
    if wanted.job is not None and wanted.earlier is None:
        stages = stages or wanted.job.placement.stages
        slots = slots or wanted.job.placement.slots
    notes = _assumed(wanted, job)
    objective: Objective
    if stages is None or slots is None:
        shape = choose_shape(
            topology, devices, workload, stages=stages, slots=slots,
            pins=stage_pins(wanted, topology, nodes, None),
            effort=replace(effort, moves=max(1000, effort.moves // 4)),
        )  # fmt: skip
        stages, slots = shape.stages, shape.slots
        objective = Seeded(shape.objective, shape.arrangement)
        said = f"{stages} stages x {slots} slots were chosen after a short search of each"
        notes += (f"{said}; bound and proof are of this grid",)
    else:
        pins = stage_pins(wanted, topology, nodes, stages)
        objective = TrainingObjective(topology, devices, workload, stages, slots, pins=pins)
    state: list[float] = []
    if wanted.earlier is not None:
        layers = wanted.earlier.arrangement.layers
        check_split(layers, workload.num_layers)
        state = [
            BYTES_PER_STATE_WEIGHT * workload.weights(s, stages, stop - start)
            for s, (start, stop) in enumerate(layers)
        ]
    previous = previous_of(wanted, topology, nodes, state)
    loads = training_loads(topology, devices, workload, slots)
    return Problem(objective, nodes, loads, previous, notes)


def job_of(wanted: Wanted, slots: int | None) -> JobBase:
    """The job with its batch: the file's or the defaults, then what was given on its own.

    Raises: DataError for a batch that does not divide into the slots.
    """
    job: JobBase
    if wanted.job is not None:
        job, batch = wanted.job, wanted.job.batch
    else:
        job = JobBase(name="plan")
        count = DEFAULT_MICROBATCHES
        if slots:
            count = slots * max(1, round(count / slots))
        longest = DEFAULT_SEQUENCE
        if wanted.model is not None:
            longest = min(longest, wanted.model.max_positions)
        batch = BatchConfig(rows=1, sequence_length=max(2, longest), num_microbatches=count)
    try:
        batch = BatchConfig.model_validate({**batch.model_dump(), **wanted.batch})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"the batch is impossible: {where}: {first['msg']}") from None
    if slots and batch.num_microbatches % slots:
        raise ManifestError(
            f"{batch.num_microbatches} microbatches do not divide into {slots} slots; "
            "give --microbatches a multiple of them"
        )
    return job.model_copy(update={"batch": batch})


def _assumed(wanted: Wanted, job: JobBase) -> tuple[str, ...]:
    batch, model = job.batch, wanted.model
    assert model is not None
    weights = model.num_layers * model.layer_weights + model.first_weights + model.last_weights
    sizes = f"{weights / 1e9:.3g} billion weights in {model.num_layers} layers"
    rows = f"{batch.rows} x {batch.sequence_length} tokens"
    notes = [f"a model of {sizes}; {batch.num_microbatches} microbatches of {rows}"]
    if wanted.nodes is None:
        like = Machine()
        notes.append(
            f"no nodes file: every node counts as {like.flops / 1e12:g} TFLOP/s, "
            f"{like.memory_bytes / 1e9:g} GB and {like.memory_bytes_per_s / 1e9:g} GB/s"
        )
    return tuple(notes)
