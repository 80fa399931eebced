"""A better placement in the making: newcomers to a stage fetch it while the others work."""

from collections.abc import Callable, Sequence
from functools import partial

from swarmnode.coordinator.events import Effect, Send
from swarmnode.coordinator.recovery import state_bytes
from swarmnode.coordinator.solver.decision import Decision
from swarmnode.domain import BlobRef, JobId, ModelFacts, PeerId, Plan
from swarmnode.messages import Inquire, Prepare, Prepared, Save, Saved, StateSource

PATIENCE_S = 120.0
"""Who has not fetched its states by then does without: the move happens all the same, or not."""
SLOW_BYTES_PER_S = 1.25e6
"""A state may take as long as over a line of 10 Mbit/s, besides."""
MAX_FAILURES = 3
"""After so many attempts that failed, newcomers do without too."""


class Preparing:
    """What newcomers to a stage need before they can take their slots with hardly a pause."""

    def __init__(
        self,
        job: JobId,
        decision: Decision,
        shadows: Sequence[Sequence[PeerId]],
        plan: Plan,
        leaves: Callable[[PeerId], bool],
        facts: ModelFacts,
        now_s: float,
    ) -> None:
        """`leaves`: whether a peer has said that it will go; it is asked for a state last."""
        self.decision = decision
        self.newcomers: dict[PeerId, list[int]] = {}
        """Peers that will hold stages of which they hold nothing today."""
        for stage, (row, dark) in enumerate(zip(decision.slots, shadows, strict=True)):
            for peer in sorted({*row, *dark} - set(plan.holders(stage))):
                self.newcomers.setdefault(peer, []).append(stage)
        self._job = job
        self._plan = plan
        self._leaves = leaves
        self._since_s = now_s
        """Of the beginning, then of the question for states: the next commit may be far off."""
        self._step: int | None = None
        self._num_failures = 0
        self._givers: dict[int, PeerId] = {}
        """Who was asked for each stage's state after `_step` steps, and what it published."""
        self._indexes: dict[int, BlobRef] = {}
        self._waiting = set(self.newcomers)
        sizes = partial(state_bytes, facts, decision.layers)
        most_bytes = max((sum(map(sizes, each)) for each in self.newcomers.values()), default=0)
        self._patience_s = PATIENCE_S + most_bytes / SLOW_BYTES_PER_S

    @property
    def is_ready(self) -> bool:
        return not self._waiting

    def is_overdue(self, now_s: float) -> bool:
        """Whether the states should be there by now, since they were asked for."""
        is_late = self._step is not None and now_s - self._since_s > self._patience_s
        return is_late or self._num_failures >= MAX_FAILURES

    def begin(self, signature: bytes) -> list[Effect]:
        """Make ourselves known to those who have no part in the job yet."""
        generation, strangers = (
            self._plan.generation,
            set(self.newcomers) - set(self._plan.workers()),
        )
        inquire = Inquire(self._job, generation, generation, 0, signature)
        return [Send(peer, inquire) for peer in sorted(strangers)]

    def ask(self, step: int, now_s: float) -> list[Effect]:
        """`step` steps are committed: ask a holder of each stage for its state, once."""
        if self._step is not None:
            return []
        self._step, self._since_s = step, now_s
        readers: dict[int, list[PeerId]] = {}
        for peer in sorted(self._waiting):
            for stage in self.newcomers[peer]:
                readers.setdefault(stage, []).append(peer)
        self._givers = {stage: self._giver(stage) for stage in sorted(readers)}
        generation = self._plan.generation
        return [
            Send(giver, Save(self._job, generation, step, stage, tuple(readers[stage])))
            for stage, giver in self._givers.items()
        ]

    def _giver(self, stage: int) -> PeerId:
        """A holder that stays, after each failure another one; one that leaves if all do."""
        holders = tuple(dict.fromkeys(self._plan.holders(stage)))
        staying = tuple(peer for peer in holders if not self._leaves(peer)) or holders
        return staying[self._num_failures % len(staying)]

    def saved(self, peer: PeerId, saved: Saved) -> list[Effect]:
        """A holder has published a state: once all have, the newcomers may fetch."""
        stage = saved.stage
        if saved.step != self._step or self._givers.get(stage) != peer or stage in self._indexes:
            return []
        self._indexes[stage] = saved.index
        return self._prepare() if self._indexes.keys() == self._givers.keys() else []

    def _prepare(self) -> list[Effect]:
        assert self._step is not None
        decision, plan, step = self.decision, self._plan, self._step
        target = decision.plan(plan.generation, plan.coordinator, plan.addresses, (), plan.voters)
        effects: list[Effect] = []
        for peer in sorted(self._waiting):
            sources = tuple(
                (stage, StateSource("fetch", step, self._indexes[stage], (self._givers[stage],)))
                for stage in self.newcomers[peer]
            )
            effects.append(Send(peer, Prepare(self._job, target, step, sources)))
        return effects

    def heard(self, peer: PeerId, prepared: Prepared) -> None:
        """A newcomer has its states on its own disk, or could not get them: then all who still
        wait get newer ones of other holders."""
        if prepared.step != self._step or peer not in self._waiting:
            return  # an answer to an earlier question
        if not prepared.failure:
            self._waiting.discard(peer)
            return
        self._num_failures += 1
        self._step = None
        self._indexes.clear()
