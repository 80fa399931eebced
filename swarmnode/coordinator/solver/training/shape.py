"""How many stages and pipelines: short searches of every shape that fits, the best ones again."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from swarmnode.coordinator.cost.needs import Workload
from swarmnode.coordinator.cost.training import Device
from swarmnode.coordinator.objective import Arrangement, Effort
from swarmnode.coordinator.solver.training.objective import TrainingObjective
from swarmnode.coordinator.topology import Topology
from swarmnode.errors import CapacityError

MOST_SHAPES = 48
"""Shapes that get a search; of more, those whose first answer is cheapest."""
SLOTS_PER_NODE = 2
"""Shapes with more slots than this for each node are left out, beyond a few."""


class Shape(NamedTuple):
    """A choice of S and V with the placement that it was chosen for."""

    stages: int
    slots: int
    objective: TrainingObjective
    arrangement: Arrangement
    cost_s: float


def choose_shape(
    topology: Topology,
    devices: Sequence[Device],
    workload: Workload,
    *,
    stages: int | None = None,
    slots: int | None = None,
    effort: Effort | None = None,
    pins: Mapping[int, int] | None = None,
    coordinator: int | None = None,
) -> Shape:
    """The S and V whose best placement found takes least; those given are kept.

    Successive halving: every shape gets an equal part of a round's moves, the better half goes
    on. Deterministic for an effort. Raises: CapacityError if no shape fits.
    """
    effort = effort or Effort(moves=400_000)
    shapes = _candidates(topology.num_nodes, workload, stages, slots)
    found: list[Shape] = []
    problem: CapacityError | None = None
    for num_stages, num_slots in shapes:
        if found and effort.should_stop():
            break
        if pins and max(pins.values()) >= num_stages:
            continue
        try:
            objective = TrainingObjective(
                topology, devices, workload, num_stages, num_slots,
                pins=pins, coordinator=coordinator,
            )  # fmt: skip
            start = objective.first(None)
        except CapacityError as error:
            problem = problem or error
            continue
        cost = objective.price(start).total_s
        found.append(Shape(num_stages, num_slots, objective, start, cost))
    if not found:
        raise problem or CapacityError("no number of stages has every pinned stage; remove a pin")
    found = sorted(found, key=_rank)[:MOST_SHAPES]
    rounds = max(1, len(found).bit_length())
    for _ in range(rounds):
        moves = max(1, effort.moves // rounds // len(found))
        found = sorted((_searched(shape, effort, moves) for shape in found), key=_rank)
        found = found[: max(1, (len(found) + 1) // 2)]
        if effort.should_stop():
            break
    return found[0]


def _candidates(
    num_nodes: int, workload: Workload, stages: int | None, slots: int | None
) -> list[tuple[int, int]]:
    """Pairs (S, V) that make sense for so many nodes."""
    all_stages = [stages] if stages else range(1, min(num_nodes, workload.num_layers, 256) + 1)
    count = workload.num_microbatches
    all_slots = [slots] if slots else [v for v in range(1, min(count, 256) + 1) if count % v == 0]
    most = max(4, SLOTS_PER_NODE * num_nodes)
    pairs = [(s, v) for s in all_stages for v in all_slots]
    return [(s, v) for s, v in pairs if s * v <= most] or pairs


def _rank(shape: Shape) -> tuple[float, int, int]:
    """The cheaper, and of equals to four digits the one with fewer slots, then fewer stages."""
    return float(f"{shape.cost_s:.4g}"), shape.stages * shape.slots, shape.stages


def _searched(shape: Shape, effort: Effort, moves: int) -> Shape:
    found = shape.objective.search(shape.arrangement, None, replace(effort, moves=moves))
    cost = shape.objective.price(found.arrangement).total_s
    return shape._replace(arrangement=found.arrangement, cost_s=cost)
