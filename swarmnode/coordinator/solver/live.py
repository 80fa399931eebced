"""The solver's answers about live jobs: from adverts and measurements to a placement of peers."""

import math
from dataclasses import replace

import numpy as np

from swarmnode.coordinator.cost.needs import split_layers, token_workload, workload_of
from swarmnode.coordinator.cost.training import Device, devices_of
from swarmnode.coordinator.objective import NOBODY, Arrangement, Effort, Previous
from swarmnode.coordinator.solver.decision import Decision
from swarmnode.coordinator.solver.request import (
    Answer,
    GridRequest,
    Improvement,
    ImproveRequest,
    Request,
)
from swarmnode.coordinator.solver.search import Solution, solve
from swarmnode.coordinator.solver.training.objective import TrainingObjective
from swarmnode.coordinator.solver.training.shape import choose_shape
from swarmnode.coordinator.survey import arrangement_of, speeds, survey
from swarmnode.coordinator.topology import make_topology
from swarmnode.coordinator.transition import charges, move_seconds
from swarmnode.domain import ModelFacts, PeerId, SlotId
from swarmnode.manifest import PlacedJob, PlacementConfig

WARM_UP_JOB = PlacedJob(name="warm-up", placement=PlacementConfig(stages=2, slots=1))
WORTH_UNEVEN = 0.85
"""Stages get different numbers of layers only if the step then takes at most this share: speeds
are measured in passing, and equal stages are easier to understand."""


def answer(request: Request, effort: Effort) -> Answer:
    """Do what is asked. Raises: CapacityError."""
    if isinstance(request, ImproveRequest):
        return improve(request, effort)
    return decide_grid(request, effort)


def warm_up() -> None:
    """Compile what a search needs, if nobody has yet: seconds that no budget should pay for."""
    for num_nodes in (2, 8):  # few enough to try all, and too many for that
        square = np.ones((num_nodes, num_nodes))
        objective = TrainingObjective(
            make_topology([str(node) for node in range(num_nodes)], square, square),
            [Device(flops=1.0, memory_bytes_per_s=1.0, room_bytes=1e9)] * num_nodes,
            workload_of(ModelFacts(2, 1, 1, 1, 1, 1, 1, False), WARM_UP_JOB),
            stages=2,
            slots=num_nodes // 2,
        )
        objective.search(objective.first(None), None, Effort(moves=100))


def improve(request: ImproveRequest, effort: Effort) -> Improvement:
    """The best placement of a running job on who is here; its layers stay as they are."""
    plan, job = request.plan, request.job
    topology = survey(request.swarm)
    index = {PeerId(name): i for i, name in enumerate(topology.names)}
    price = token_workload if request.serves else workload_of
    workload = price(request.facts, job)
    objective = TrainingObjective(
        topology,
        devices_of(request.swarm.peers, job, speeds(request.swarm, job)),
        workload,
        plan.num_stages,
        plan.num_slots,
        pins={index[peer]: stage for peer, stage in job.placement.pins.items() if peer in index},
        coordinator=index.get(plan.coordinator),
        layers=plan.layers,
        min_nodes=job.placement.fewest_peers,
    )
    now = arrangement_of(plan, index)
    state_bytes = [need.state_bytes for need in workload.needs(plan.layers, plan.num_slots)]
    is_whole = all(node != NOBODY for row in now.slots for node in row)
    current_s = objective.price(now).total_s if is_whole else math.inf
    num_steps = request.calm_s / current_s if 0.0 < current_s < math.inf else 1.0
    previous = charges(now, topology, state_bytes, num_steps)
    solution = solve(objective, previous=previous, effort=effort)
    new = repaired(solution.arrangement, previous)
    decision = _decision(solution, new, previous, topology.names, objective.explain(new))
    if not request.serves:  # a committed step may be a round of what was priced
        every = job.codecs.num_local_steps
        bound_s = None if decision.bound_s is None else every * decision.bound_s
        decision = replace(decision, cost_s=every * decision.cost_s, bound_s=bound_s)
        current_s *= every
    return Improvement(
        decision=decision,
        current_s=current_s if math.isfinite(current_s) else None,
        move_s=move_seconds(now, new, topology, state_bytes),
    )


def repaired(new: Arrangement, previous: Previous) -> Arrangement:
    """`new` with equal columns back in their old order, so that nothing seems to move."""
    old = previous.arrangement
    columns = list(zip(*new.slots, strict=True))
    order: list[tuple[int, ...] | None] = [None] * len(columns)
    for column, hosts in enumerate(zip(*old.slots, strict=True)):
        if column < len(order) and hosts in columns:
            order[column] = hosts
            columns.remove(hosts)
    whole = [hosts if hosts is not None else columns.pop(0) for hosts in order]
    return replace(new, slots=tuple(zip(*whole, strict=True)))


def _decision(
    solution: Solution,
    new: Arrangement,
    previous: Previous,
    names: tuple[str, ...],
    words: tuple[str, ...],
) -> Decision:
    """A solution in terms of peers."""
    held = {(node, s) for s, row in enumerate(previous.arrangement.slots) for node in row}
    bound = solution.bound.seconds if solution.bound else None
    return Decision(
        layers=new.layers,
        slots=tuple(tuple(PeerId(names[node]) for node in row) for row in new.slots),
        cost_s=solution.cost_s,
        bound_s=bound,
        reasons=(*words, *solution.reasons),
        moved=tuple(
            SlotId(s, v)
            for s, row in enumerate(new.slots)
            for v, node in enumerate(row)
            if (node, s) not in held
        ),
    )


def decide_grid(request: GridRequest, effort: Effort) -> PlacementConfig:
    """What a job leaves open of its grid: stages, slots, layers of each stage."""
    wish, job = request.job.placement, request.job
    topology = survey(request.swarm)
    devices, workload = devices_of(request.swarm.peers, job), workload_of(request.facts, job)
    stages = wish.stages or (len(wish.layers) if wish.layers else None)
    slots = wish.slots
    if stages is None or slots is None:
        shape = choose_shape(topology, devices, workload, stages=stages, slots=slots, effort=effort)
        stages, slots = shape.stages, shape.slots
    decided = PlacementConfig(
        **{**wish.model_dump(exclude_none=True), "stages": stages, "slots": slots}
    )
    if wish.layers is not None or stages > request.facts.num_layers:
        return decided
    index = {PeerId(name): i for i, name in enumerate(topology.names)}
    pins = {index[peer]: stage for peer, stage in wish.pins.items() if peer in index}
    equal = split_layers(request.facts.num_layers, stages)
    least = decided.fewest_peers
    free, fixed = (
        solve(
            TrainingObjective(
                topology, devices, workload, stages, slots,
                pins=pins, layers=layers, min_nodes=least,
            ),
            effort=effort,
        )
        for layers in (None, equal)
    )  # fmt: skip
    if free.cost_s > WORTH_UNEVEN * fixed.cost_s:
        return decided
    counts = tuple(stop - start for start, stop in free.arrangement.layers)
    return decided.model_copy(update={"layers": counts})
