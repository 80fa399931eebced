"""Throughput over the longest chain allowed: what each hop more brings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from swarmnode.coordinator.cost.serving import ServingInstance
from swarmnode.coordinator.objective import Arrangement, Effort
from swarmnode.coordinator.solver.serving.bound import fewest_hops
from swarmnode.coordinator.solver.serving.objective import ServingObjective
from swarmnode.errors import CapacityError

TOLERANCE = 1e-9


@dataclass(frozen=True)
class FrontPoint:
    """The best placement found under one limit."""

    max_hops: int
    hops: int
    """Nodes in its longest usable chain."""
    tokens_per_s: float
    latency_s: float
    arrangement: Arrangement
    bound_tokens_per_s: float
    """No placement within the limit serves more."""


def front(
    instance: ServingInstance, effort: Effort, *, partial: bool = False
) -> tuple[FrontPoint, ...]:
    """One point for each hop limit from the least possible to N; throughput never falls.

    `effort.moves` is for each limit. A limit starts from the point before it, and once a
    point reaches the bound without a limit it stands for all that follow. With partial ranges
    the front of exact ones is searched first, with as much effort: they are a special case.

    Raises: CapacityError if no chain holds the model.
    """
    points: list[FrontPoint] = []
    exact = {p.max_hops: p for p in front(instance, effort)} if partial else {}
    top = ServingObjective(instance, partial=partial).top
    for max_hops in range(fewest_hops(instance), instance.num_nodes + 1):
        if points and points[-1].tokens_per_s >= top * (1.0 - TOLERANCE):
            points.append(replace(points[-1], max_hops=max_hops))
            continue
        objective = ServingObjective(instance, max_hops=max_hops, partial=partial)
        known = [*points[-1:], *filter(None, [exact.get(max_hops)])]
        point = _point(objective, max_hops, effort, known)
        if point is not None:
            points.append(point)
    if not points:
        raise CapacityError(f"no chain of all {instance.num_nodes} nodes holds the model")
    return tuple(points)


def _point(
    objective: ServingObjective, max_hops: int, effort: Effort, known: Sequence[FrontPoint]
) -> FrontPoint | None:
    """The best of a search from the seeds and known points; None if the limit allows none."""
    if known:
        ways = [point.arrangement for point in known]
        start = min(ways, key=lambda way: objective.price(way).total_s)
    else:
        try:
            start = objective.first(None)
        except CapacityError:
            return None
    found = objective.search(start, None, effort).arrangement
    parts = objective.price(found).parts
    return FrontPoint(
        max_hops=max_hops,
        hops=round(parts["hops"]),
        tokens_per_s=parts["tokens_per_s"],
        latency_s=parts["latency_s"],
        arrangement=found,
        bound_tokens_per_s=objective.top,
    )
