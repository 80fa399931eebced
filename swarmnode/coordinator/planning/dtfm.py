"""DT-FM's instance: its constants, its scaling to other grids, a network's tables as they are."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from swarmnode.coordinator.cost.dtfm import ACTIVATION_BYTES, GRADIENT_BYTES
from swarmnode.coordinator.objective import Effort
from swarmnode.coordinator.planning.loads import grid_loads
from swarmnode.coordinator.planning.problem import (
    BYTES_PER_STATE_WEIGHT,
    Problem,
    Wanted,
    check_room,
    check_split,
    previous_of,
    stage_pins,
)
from swarmnode.coordinator.topology import Topology
from swarmnode.errors import CapacityError, DataError

DTFM_GRID = 8
"""DT-FM's constants are those of 8 stages x 8 pipelines."""
DTFM_LAYERS = 24


def dtfm_problem(
    wanted: Wanted,
    topology: Topology,
    nodes: tuple[int, ...],
    grid: tuple[int | None, int | None],
    effort: Effort,
) -> Problem:
    """DtfmObjective over the network's own tables; a grid left open is searched for.

    A grid that was asked for has DT-FM's constants as they are. One that was left open has them
    scaled to it, so that all grids train the same model on the same batch.

    Raises: CapacityError or DataError with one line.
    """
    from swarmnode.coordinator.solver.grid.dtfm import DtfmObjective

    is_open = wanted.stages is None and wanted.slots is None

    def objective(stages: int, slots: int) -> Any:
        gradient, activation = dtfm_bytes(stages, slots) if is_open else dtfm_bytes(8, 8)
        return DtfmObjective(
            topology,
            stages,
            slots,
            gradient_bytes=wanted.gradient_bytes or gradient,
            activation_bytes=wanted.activation_bytes or activation,
            pins=stage_pins(wanted, topology, nodes, stages),
            most_moved=wanted.most_moved,
        )

    stages, slots = grid
    notes: tuple[str, ...] = ()
    if stages is None or slots is None:
        shapes = dtfm_shapes(len(nodes), stages, slots)
        stages, slots, notes = _best_shape(objective, shapes, effort)
    check_room(len(nodes), stages, slots)
    chosen = objective(stages, slots)
    gradient = wanted.gradient_bytes or dtfm_bytes(stages if is_open else 8, 8)[0]
    activation = wanted.activation_bytes or dtfm_bytes(8, slots if is_open else 8)[1]
    sizes = (
        f"{gradient / 1e9:.4g} GB of gradients a stage, {activation / 1e9:.4g} GB of activations"
    )
    notes += (f"{stages} stages x {slots} pipelines; {sizes} a pipeline",)
    spare = len(nodes) - stages * slots
    if spare:
        notes += (f"{spare} of {len(nodes)} nodes stay spare",)
    if wanted.earlier is not None:
        check_split(wanted.earlier.arrangement.layers, stages)
    state = [BYTES_PER_STATE_WEIGHT / 4 * gradient] * stages
    previous = previous_of(wanted, topology, nodes, state)
    loads = grid_loads(topology, activation, gradient)
    return Problem(chosen, nodes, loads, previous, notes)


def dtfm_bytes(stages: int, slots: int) -> tuple[float, float]:
    """Gradient bytes of a stage and activation bytes of a pipeline, of DT-FM's model and batch."""
    return GRADIENT_BYTES * DTFM_GRID / stages, ACTIVATION_BYTES * DTFM_GRID / slots


def dtfm_shapes(count: int, stages: int | None, slots: int | None) -> list[tuple[int, int]]:
    """Grids worth a look: for every number of stages the most pipelines that the nodes allow."""
    if stages is not None:
        return [(stages, max(1, count // stages))]
    if slots is not None:
        return [(max(1, min(DTFM_LAYERS, count // slots)), slots)]
    if count == DTFM_GRID**2:
        return [(DTFM_GRID, DTFM_GRID)]
    most = min(count, DTFM_LAYERS)
    whole = [(s, count // s) for s in range(1, most + 1) if count % s == 0]
    if len(whole) > 2 or most < 4:
        return whole
    return [(s, count // s) for s in range(1, most + 1)]


def _best_shape(
    objective: Any, shapes: Sequence[tuple[int, int]], effort: Effort
) -> tuple[int, int, tuple[str, ...]]:
    """The grid of least cost after a short search in each. Raises: the first one's refusal."""
    if len(shapes) == 1:
        return *shapes[0], ()
    brief = replace(effort, moves=max(1000, effort.moves // (4 * len(shapes))))
    costs: dict[tuple[int, int], float] = {}
    refusal: CapacityError | DataError | None = None
    for shape in shapes:
        if costs and effort.should_stop():
            break
        try:
            plugged = objective(*shape)
            found = plugged.search(plugged.first(None), None, brief)
            costs[shape] = plugged.price(found.arrangement).total_s
        except (CapacityError, DataError) as error:
            refusal = refusal or error
    usable = {shape: cost for shape, cost in costs.items() if np.isfinite(cost)}
    if not usable:
        raise refusal or CapacityError("no grid of stages and pipelines has links for all it needs")
    order = sorted(usable, key=lambda shape: (usable[shape], shape))
    said = ", ".join(f"{s} x {v}: {usable[s, v]:.4g} s" for s, v in order[:4])
    count = str(len(shapes)) if len(costs) == len(shapes) else f"{len(costs)} of {len(shapes)}"
    note = f"tried {count} grids, each briefly; {said}; bound and proof are of the best"
    return *order[0], (note,)
