"""The one way to a placement: first answer, search, choice, bound, with what it all means."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from swarmnode.coordinator.objective import (
    Arrangement,
    Bound,
    Effort,
    Found,
    Objective,
    Previous,
)

TOLERANCE = 1e-9
"""Relative difference below which two costs count as equal."""


@dataclass(frozen=True)
class Solution:
    """A placement, how good it is, and how good any could be."""

    objective: str
    arrangement: Arrangement
    cost_s: float
    parts: Mapping[str, float]
    bound: Bound | None
    is_optimal: bool
    """Proven: the bound is reached, or an exact method looked at everything."""
    moves_done: int
    seed: int
    reasons: tuple[str, ...]
    moved: tuple[int, ...]
    """Surviving nodes that must fetch the state of a stage that they did not hold."""

    @property
    def gap(self) -> float | None:
        """(cost - bound) / cost: how much better a placement could be at most; None if unknown."""
        if self.bound is None:
            return None
        return max(0.0, (self.cost_s - self.bound.seconds) / self.cost_s) if self.cost_s else 0.0


def solve(
    objective: Objective, *, previous: Previous | None = None, effort: Effort | None = None
) -> Solution:
    """Find a good arrangement and say how good it is; `previous` charges for what must move.

    Raises: CapacityError if nothing fits, DataError if the instance makes no sense.
    """
    effort = effort or Effort()
    start = objective.first(previous)
    found = objective.search(start, previous, effort)
    best = _better(objective, previous, found, start)
    bound = objective.bound(effort)
    price = objective.price(best.arrangement)
    is_optimal = best.is_optimal and previous is None
    if is_optimal and (bound is None or bound.seconds < price.total_s):
        bound = Bound(price.total_s, "an exact search found nothing better")
    if bound is not None and bound.seconds >= price.total_s * (1.0 - TOLERANCE):
        bound, is_optimal = replace(bound, seconds=price.total_s), True
    return Solution(
        objective=objective.name,
        arrangement=best.arrangement,
        cost_s=price.total_s,
        parts=price.parts,
        bound=bound,
        is_optimal=is_optimal,
        moves_done=best.moves_done,
        seed=effort.seed,
        reasons=best.reasons,
        moved=moved_nodes(best.arrangement, previous),
    )


def _better(
    objective: Objective, previous: Previous | None, found: Found, start: Arrangement
) -> Found:
    """What was found, unless the first answer is better: then the search has a fault."""

    def cost(arrangement: Arrangement) -> float:
        return objective.price(arrangement).total_s + objective.charged_s(arrangement, previous)

    if cost(found.arrangement) <= cost(start) * (1.0 + TOLERANCE):
        return found
    return replace(found, arrangement=start, is_optimal=False)


def moved_nodes(arrangement: Arrangement, previous: Previous | None) -> tuple[int, ...]:
    """Nodes of the previous placement that host a stage now that they did not hold.

    A stage whose layers changed counts as another stage.
    """
    if previous is None:
        return ()
    old = previous.arrangement
    held = {(n, old.layers[s]) for s, row in enumerate(old.slots) for n in row}
    survivors = set(old.nodes)
    return tuple(
        sorted(
            {
                node
                for stage, row in enumerate(arrangement.slots)
                for node in row
                if node in survivors and (node, arrangement.layers[stage]) not in held
            }
        )
    )
