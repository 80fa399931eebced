"""A better placement in the making: newcomers to a stage fetch it while the others work."""

from collections.abc import Sequence

from swarmnode.coordinator.events import Effect, Send
from swarmnode.coordinator.solver.decision import Decision
from swarmnode.domain import BlobRef, JobId, PeerId, Plan
from swarmnode.messages import Inquire, Prepare, Save, Saved, StateSource

PATIENCE_S = 120.0
"""Who has not fetched its states by then does without: the move happens all the same, or not."""


class Preparing:
    """What newcomers to a stage need before they can take their slots with hardly a pause."""

    def __init__(
        self,
        job: JobId,
        decision: Decision,
        shadows: Sequence[Sequence[PeerId]],
        plan: Plan,
        now_s: float,
    ) -> None:
        self.decision = decision
        self.newcomers: dict[PeerId, list[int]] = {}
        """Peers that will hold stages of which they hold nothing today."""
        for stage, (row, dark) in enumerate(zip(decision.slots, shadows, strict=True)):
            for peer in sorted({*row, *dark} - set(plan.holders(stage))):
                self.newcomers.setdefault(peer, []).append(stage)
        self._job = job
        self._plan = plan
        self._since_s = now_s
        self._step: int | None = None
        self._indexes: dict[int, tuple[BlobRef, PeerId]] = {}
        self._waiting = set(self.newcomers)

    @property
    def is_ready(self) -> bool:
        return not self._waiting

    def is_overdue(self, now_s: float) -> bool:
        return now_s - self._since_s > PATIENCE_S

    def begin(self, signature: bytes) -> list[Effect]:
        """Make ourselves known to those who have no part in the job yet."""
        generation, strangers = (
            self._plan.generation,
            set(self.newcomers) - set(self._plan.workers()),
        )
        inquire = Inquire(self._job, generation, generation, 0, signature)
        return [Send(peer, inquire) for peer in sorted(strangers)]

    def ask(self, step: int) -> list[Effect]:
        """`step` steps are committed: ask a holder of each stage for its state, once."""
        if self._step is not None:
            return []
        self._step = step
        generation = self._plan.generation
        readers: dict[int, list[PeerId]] = {}
        for peer, stages in sorted(self.newcomers.items()):
            for stage in stages:
                readers.setdefault(stage, []).append(peer)
        return [
            Send(
                self._plan.slots[stage][0],
                Save(self._job, generation, step, stage, tuple(peers)),
            )
            for stage, peers in sorted(readers.items())
        ]

    def saved(self, peer: PeerId, saved: Saved) -> list[Effect]:
        """A holder has published a state: once all have, the newcomers may fetch."""
        if saved.step != self._step or self._plan.slots[saved.stage][0] != peer:
            return []
        stages = {stage for found in self.newcomers.values() for stage in found}
        if saved.stage not in stages or saved.stage in self._indexes:
            return []
        self._indexes[saved.stage] = (saved.index, peer)
        return self._prepare() if self._indexes.keys() == stages else []

    def _prepare(self) -> list[Effect]:
        assert self._step is not None
        decision, plan, step = self.decision, self._plan, self._step
        target = decision.plan(plan.generation, plan.coordinator, plan.addresses, (), plan.voters)
        effects: list[Effect] = []
        for peer, stages in sorted(self.newcomers.items()):
            sources = tuple(
                (stage, StateSource("fetch", step, index, (holder,)))
                for stage, (index, holder) in sorted(self._indexes.items())
                if stage in stages
            )
            effects.append(Send(peer, Prepare(self._job, target, step, sources)))
        return effects

    def prepared(self, peer: PeerId) -> None:
        """A newcomer has its states on its own disk."""
        self._waiting.discard(peer)
