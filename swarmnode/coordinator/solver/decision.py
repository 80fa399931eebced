"""A placement for peers, as the coordinator acts on it."""

from collections.abc import Mapping
from dataclasses import dataclass

from swarmnode.domain import Generation, PeerId, Plan, SlotId

MAX_REASONS = 64
"""Lines of explanation that travel with a plan."""


@dataclass(frozen=True)
class Decision:
    """Which peer hosts which slot, with what is known about it."""

    layers: tuple[tuple[int, int], ...]
    slots: tuple[tuple[PeerId, ...], ...]
    cost_s: float
    """Predicted seconds per step."""
    bound_s: float | None
    """No placement can be faster than this; None when no bound is known."""
    reasons: tuple[str, ...]
    moved: tuple[SlotId, ...]
    """Slots whose machine must fetch the stage's state."""

    def plan(
        self,
        generation: Generation,
        coordinator: PeerId,
        addresses: Mapping[PeerId, tuple[str, ...]],
        shadows: tuple[tuple[PeerId, ...], ...],
        voters: tuple[PeerId, ...],
        voters_before: tuple[PeerId, ...] = (),
    ) -> Plan:
        """The decision as what workers are told."""
        return Plan(
            generation=generation,
            layers=self.layers,
            slots=self.slots,
            coordinator=coordinator,
            addresses=addresses,
            reasons=self.reasons[:MAX_REASONS],
            predicted_step_s=self.cost_s,
            bound_s=self.bound_s,
            shadows=shadows,
            voters=voters,
            voters_before=voters_before,
        )


def decision_of(plan: Plan) -> Decision:
    """Everybody stays where `plan` has put them."""
    return Decision(
        plan.layers, plan.slots, plan.predicted_step_s, plan.bound_s, plan.reasons, moved=()
    )
