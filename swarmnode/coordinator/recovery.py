"""Who holds which stage's state, and where a new host gets it from."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from swarmnode.coordinator.events import CheckpointRecord
from swarmnode.coordinator.solver.decision import Decision
from swarmnode.domain import PeerId, Plan
from swarmnode.manifest import Manifest
from swarmnode.messages import StateSource


class Holdings:
    """The peers that hold each stage's state at the last committed step."""

    def __init__(self, num_stages: int) -> None:
        self._held_by: list[set[PeerId]] = [set() for _ in range(num_stages)]

    def of(self, stage: int) -> frozenset[PeerId]:
        return frozenset(self._held_by[stage])

    def forget(self, peer: PeerId) -> None:
        for peers in self._held_by:
            peers.discard(peer)

    def forget_stage(self, stage: int) -> None:
        self._held_by[stage].clear()

    def clear(self) -> None:
        for peers in self._held_by:
            peers.clear()

    def keep_only(self, plan: Plan) -> None:
        """A peer drops the stages that a new plan takes from it."""
        for stage, peers in enumerate(self._held_by):
            peers &= set(plan.slots[stage])

    def add(self, peer: PeerId, plan: Plan) -> None:
        """`peer` says that all its slots of `plan` are in place."""
        for at in plan.hosted_by(peer):
            self._held_by[at.stage].add(peer)

    def missing(self, slots: Sequence[Sequence[PeerId]]) -> tuple[int, ...]:
        """Stages of which some future host has no state."""
        return tuple(s for s, row in enumerate(slots) if not set(row) <= self._held_by[s])


@dataclass
class Gather:
    """A placement that waits until the state which it needs is published."""

    decision: Decision
    sources: dict[int, StateSource] = field(default_factory=dict)
    awaited: dict[int, PeerId] = field(default_factory=dict)
    """stage -> the holder that was asked to publish it."""

    @classmethod
    def of(cls, decision: Decision, holdings: Holdings) -> "Gather | None":
        """What must move, asked of a live holder each; None if some stage has none."""
        gather = cls(decision)
        for stage in holdings.missing(decision.slots):
            if not holdings.of(stage):
                return None
            gather.awaited[stage] = min(holdings.of(stage))
        return gather

    @classmethod
    def restored(
        cls, decision: Decision, checkpoint: CheckpointRecord | None, manifest: Manifest, me: PeerId
    ) -> "Gather":
        """Every stage from the newest checkpoint, else as the job began; `me` serves both."""
        gather = cls(decision)
        for stage in range(len(decision.slots)):
            if checkpoint is not None:
                source = StateSource("fetch", checkpoint.indexes[stage], (me,))
            elif manifest.model.weights is not None:
                source = StateSource("fetch", manifest.model.weights, (me,))
            else:
                source = StateSource("init")
            gather.sources[stage] = source
        return gather

    def source(self, stage: int, peer: PeerId, holdings: Holdings) -> StateSource:
        """Where `peer` gets `stage`."""
        if peer in holdings.of(stage):
            return StateSource("keep")
        return self.sources[stage]
