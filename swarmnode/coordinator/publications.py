"""Checkpoints on their way: asked of holders, published by them, stored by the coordinator."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from swarmnode.coordinator.events import CheckpointRecord, Effect, Send, StoreState
from swarmnode.domain import BlobRef, Generation, JobId, PeerId, Plan
from swarmnode.messages import (
    Save,
    Saved,
)

PATIENCE_S = 600.0
"""A publication that is not complete by then is given up."""
PAUSE_S = 10.0
"""Before the next one after one that could not be stored; doubles each time, up to PATIENCE_S."""


@dataclass
class _Publication:
    """The state after some step, stage by stage."""

    generation: Generation
    asked: Mapping[int, PeerId]
    since_s: float
    indexes: dict[int, BlobRef] = field(default_factory=dict)
    stored: set[int] = field(default_factory=set)


class Publications:
    """States that were asked for, by step; complete when every stage's chunks are stored."""

    def __init__(self) -> None:
        self._open: dict[int, _Publication] = {}
        self._pause_s = PAUSE_S
        self._again_s = -math.inf

    def is_time(self, now_s: float) -> bool:
        """Whether another one may begin: none is on its way, and the last did not just fail."""
        return not self._open and now_s >= self._again_s

    def __contains__(self, step: int) -> bool:
        return step in self._open

    def ask(self, job: JobId, plan: Plan, step: int, now_s: float) -> list[Effect]:
        """Ask a holder of each stage for the state after `step` committed steps."""
        holders = {stage: row[0] for stage, row in enumerate(plan.slots)}
        self._open[step] = _Publication(plan.generation, holders, now_s)
        return [
            Send(peer, Save(job, plan.generation, step, stage)) for stage, peer in holders.items()
        ]

    def published(self, peer: PeerId, saved: Saved) -> list[Effect]:
        """A holder answered: fetch it, unless it was not asked, or answered before."""
        wanted, stage = self._open.get(saved.step), saved.stage
        if wanted is None or wanted.asked.get(stage) != peer or stage in wanted.indexes:
            return []
        if saved.generation < wanted.generation:  # the step was given up and computed again
            return []
        wanted.indexes[stage] = saved.index
        return [StoreState(stage, saved.step, saved.index, peer)]

    def stored(self, step: int, stage: int, index: BlobRef) -> CheckpointRecord | None:
        """The chunks of `index` are here; the checkpoint once those of every stage are."""
        wanted = self._open.get(step)
        if wanted is None or wanted.indexes.get(stage) != index:
            return None
        wanted.stored.add(stage)
        if wanted.stored != set(wanted.asked):
            return None
        self.give_up(step)
        self._pause_s = PAUSE_S
        return CheckpointRecord(step, tuple(wanted.indexes[s] for s in sorted(wanted.asked)))

    def give_up(self, step: int) -> None:
        self._open.pop(step, None)

    def lost(self, step: int, now_s: float) -> None:
        """It cannot be stored here, for lack of room or because it came too slowly."""
        if step in self._open:
            self.give_up(step)
            self._again_s = now_s + self._pause_s
            self._pause_s = min(2 * self._pause_s, PATIENCE_S)

    def give_up_unanswered(self) -> None:
        """A new generation begins: holders that have not answered yet will not."""
        for step, wanted in list(self._open.items()):
            if set(wanted.indexes) != set(wanted.asked):
                self.give_up(step)

    def rewind(self, step: int) -> None:
        """Steps from `step` on are given up: states of more steps are of no history any more."""
        for later in [at for at in self._open if at > step]:
            self.give_up(later)

    def expire(self, now_s: float) -> None:
        """Give up what has taken too long."""
        for step, wanted in list(self._open.items()):
            if now_s - wanted.since_s > PATIENCE_S:
                self.lost(step, now_s)
