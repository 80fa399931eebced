"""A serving instance: Helix's file as it is, or our own machines and a model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from swarmnode.coordinator.planning.inputs import Machine, read_range_pins, read_topology
from swarmnode.coordinator.planning.loads import serving_loads
from swarmnode.coordinator.planning.problem import (
    Problem,
    Wanted,
    alive,
    check_room,
    machines_of,
    previous_of,
    same_objective,
    stage_pins,
)
from swarmnode.coordinator.topology import Topology
from swarmnode.errors import DataError

BYTES_PER_SERVED_WEIGHT = 2
HELIX_LAYER_BYTES = 1.7e9
"""A layer of LLaMA-70B in half precision, for files that list rates but no sizes."""


def _serving_pins(
    wanted: Wanted, topology: Topology, nodes: Sequence[int], grid: tuple[int, int] | None
) -> Mapping[int, Any]:
    """Stages in a grid; without one, half-open ranges of layers."""
    if grid is not None:
        return stage_pins(wanted, topology, nodes, grid[0])
    return read_range_pins(wanted.pins, topology.names, nodes)


def serving_problem(wanted: Wanted) -> Problem:
    """ServingObjective over a Helix-like file, or over our own machines and a model.

    Raises: CapacityError or DataError with one line.
    """
    from swarmnode.coordinator.cost.serving import parse_serving
    from swarmnode.coordinator.solver.serving.objective import ServingObjective

    is_helix = "tokens_per_s_by_layers" in wanted.network
    notes: tuple[str, ...] = ()
    if is_helix:
        instance = parse_serving(wanted.network)
        layer_bytes = HELIX_LAYER_BYTES
    else:
        instance, layer_bytes, notes = _own_instance(wanted)
    nodes = alive(instance.num_nodes, wanted.gone)
    part = take_instance(instance, nodes)
    grid = None
    if wanted.stages is not None or wanted.slots is not None:
        stages = wanted.stages or max(1, len(nodes) // (wanted.slots or 1))
        slots = wanted.slots or max(1, len(nodes) // stages)
        check_room(len(nodes), stages, slots)
        grid = (stages, slots)
    objective = ServingObjective(
        part,
        max_hops=min(wanted.max_hops, len(nodes)) if wanted.max_hops else None,
        max_latency_s=wanted.max_latency_s,
        latency_weight=wanted.latency_weight,
        partial=wanted.partial,
        grid=grid,
        pins=_serving_pins(wanted, part.topology, nodes, grid),
    )
    state: list[float] = []
    if wanted.earlier is not None:
        same_objective(wanted)
        layers = wanted.earlier.arrangement.layers
        if max(stop for _, stop in layers) > instance.num_layers:
            raise DataError(f"the previous plan has layers beyond the {instance.num_layers} here")
        state = [layer_bytes * (stop - start) for start, stop in layers]
    previous = previous_of(wanted, part.topology, nodes, state)
    return Problem(objective, nodes, serving_loads(objective, part), previous, notes)


def take_instance(instance: Any, nodes: Sequence[int]) -> Any:
    """The part of a serving instance that `nodes` are, in that order."""
    rows = np.asarray(nodes, dtype=np.intp)
    return replace(
        instance,
        topology=instance.topology.take(nodes),
        rate=instance.rate[rows],
        link_tokens_per_s=instance.link_tokens_per_s[np.ix_(rows, rows)],
        source_tokens_per_s=instance.source_tokens_per_s[rows],
        sink_tokens_per_s=instance.sink_tokens_per_s[rows],
        layer_s=instance.layer_s[rows],
        kinds=tuple(instance.kinds[node] for node in nodes),
    )


def _own_instance(wanted: Wanted) -> tuple[Any, float, tuple[str, ...]]:
    """A serving instance of our own machines, in half precision."""
    from swarmnode.coordinator.cost.serving import ServingDevice, ServingModel, serving_instance

    assert wanted.model is not None
    topology, facts = read_topology(wanted.network), wanted.model
    machines = machines_of(wanted, topology.names, range(topology.num_nodes))
    ends = (facts.first_weights + facts.last_weights) / max(1, facts.num_layers)
    layer_bytes = BYTES_PER_SERVED_WEIGHT * (facts.layer_weights + ends)
    model = ServingModel(
        num_layers=facts.num_layers,
        layer_bytes=layer_bytes,
        kv_bytes_per_token=2.0 * BYTES_PER_SERVED_WEIGHT * facts.hidden_size * wanted.kv_share,
        layer_flops_per_token=2.0 * facts.layer_weights,
        activation_bytes_per_token=float(BYTES_PER_SERVED_WEIGHT * facts.hidden_size),
    )
    devices = [
        ServingDevice(_kind(m), m.memory_bytes, m.memory_bytes_per_s, m.flops) for m in machines
    ]
    instance = serving_instance(topology, devices, model, context_tokens=wanted.context_tokens)
    # No node takes in or gives out more than it serves: a flow among such numbers loses no digits.
    most = np.full(topology.num_nodes, 2.0 * max(1.0, float(instance.rate.max())))
    instance = replace(
        instance,
        source_tokens_per_s=most,
        sink_tokens_per_s=most,
        link_tokens_per_s=np.minimum(instance.link_tokens_per_s, most),
    )
    note = (
        f"{facts.num_layers} layers of {layer_bytes / 1e9:.3g} GB in half precision (embeddings "
        f"and head spread over them); contexts of {wanted.context_tokens} tokens"
    )
    return instance, layer_bytes, (note,)


def _kind(machine: Machine) -> str:
    return f"{machine.memory_bytes / 1e9:.3g} GB, {machine.flops / 1e12:.3g} TFLOP/s"
