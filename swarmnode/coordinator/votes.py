"""The READYs of one step: when they are complete, whether they agree, and what they add up to."""

import math
from statistics import fmean

from swarmnode.coordinator.events import CommitRecord
from swarmnode.domain import Generation, Plan, SlotId
from swarmnode.errors import SwarmError
from swarmnode.wire import Ready


class DisagreementError(SwarmError):
    """The READYs contradict each other: do not commit, compute the step again."""


class DivergedError(SwarmError):
    """The loss or the gradient is not finite: no further step makes sense."""


class Votes:
    """One READY for each slot; a repeated one replaces the first (they are equal)."""

    def __init__(self) -> None:
        self._ready: dict[SlotId, Ready] = {}

    def clear(self) -> None:
        self._ready.clear()

    def add(self, ready: Ready) -> None:
        self._ready[ready.source] = ready

    def is_complete(self, plan: Plan) -> bool:
        return len(self._ready) == plan.num_stages * plan.num_slots

    def commit(
        self,
        step: int,
        generation: Generation,
        plan: Plan,
        num_microbatches: int,
        clip: float | None,
    ) -> CommitRecord:
        """What is to be journaled: the clip scale as in torch's clip_grad_norm_, and the loss.

        Raises: DisagreementError, DivergedError.
        """
        self._check(plan, num_microbatches)
        sums: dict[int, float] = {}
        for at in sorted(self._ready):
            for group, value in self._ready[at].sums_of_squares:
                sums.setdefault(group, value)
        norm = math.sqrt(math.fsum(sums.values()))
        by_microbatch = {
            microbatch: loss
            for ready in self._ready.values()
            for microbatch, loss in zip(ready.microbatches, ready.losses, strict=False)
        }
        loss = fmean(by_microbatch[mb] for mb in sorted(by_microbatch))
        if not math.isfinite(norm) or not math.isfinite(loss):
            raise DivergedError(
                f"step {step}: loss {loss:g}, gradient norm {norm:g}; "
                "lower optimizer.learning_rate and submit again"
            )
        scale = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        digests = tuple(self._ready[SlotId(s, 0)].digest for s in range(plan.num_stages))
        return CommitRecord(generation, step, scale, loss, digests)

    def _check(self, plan: Plan, num_microbatches: int) -> None:
        last = plan.num_stages - 1
        for at, ready in sorted(self._ready.items()):
            owned = tuple(range(at.slot, num_microbatches, plan.num_slots))
            where = f"stage {at.stage} slot {at.slot}"
            if tuple(sorted(ready.microbatches)) != owned:
                raise DisagreementError(f"{where} counted {ready.microbatches}, not {owned}")
            if at.stage == last and len(ready.losses) != len(owned):
                raise DisagreementError(f"{where} gave {len(ready.losses)} losses")
            if ready.digest != self._ready[SlotId(at.stage, 0)].digest:
                raise DisagreementError(f"{where} holds another gradient than slot 0")
