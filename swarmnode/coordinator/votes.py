"""What workers say of a step: when it is complete, whether they agree, what it adds up to."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from swarmnode.coordinator.events import CommitRecord
from swarmnode.domain import PeerId, Plan, SlotId
from swarmnode.errors import SwarmError
from swarmnode.manifest import Manifest
from swarmnode.messages import (
    Ready,
)


@dataclass(eq=False)
class DisagreementError(SwarmError):
    """What workers say cannot all be true: do not commit, give `peer` no work for a while."""

    peer: PeerId
    reason: str

    def __str__(self) -> str:
        return self.reason


DIVERGED_HINT = "lower optimizer.learning_rate and submit again"


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
        """Whether every slot and every shadow holds its stage's update of the step."""
        return len(self._ready) == sum(len(plan.holders(s)) for s in range(plan.num_stages))

    def commit(self, step: int, plan: Plan, manifest: Manifest) -> CommitRecord:
        """What is to be journaled: the clip scale as in torch's clip_grad_norm_, and the loss.

        One Ready for each stage is enough: whoever holds the reduced gradient has the whole of it.
        The loss is the mean of what is known: of all, while a holder of the last stage is left.
        Raises: DisagreementError, DivergedError.
        """
        num_microbatches = manifest.microbatches_per_step
        self._check(plan, num_microbatches)
        sums: dict[int, float] = {}
        for at in sorted(self._ready):
            for group, value in self._ready[at].sums_of_squares:
                sums.setdefault(group, value)
        squares = list(sums.values())
        is_finite = all(0 <= square < 1e300 for square in squares)
        norm = math.sqrt(math.fsum(squares)) if is_finite else math.inf
        by_microbatch = {
            microbatch: loss
            for ready in self._ready.values()
            for microbatch, loss in zip(ready.microbatches, ready.losses, strict=False)
        }
        if len(by_microbatch) < num_microbatches:
            by_microbatch |= self._losses_told(plan, num_microbatches)
        loss = mean_loss([by_microbatch[mb] for mb in sorted(by_microbatch)])
        if math.isfinite(norm):
            self._check_losses(plan)
        if not math.isfinite(norm) or (by_microbatch and not math.isfinite(loss)):
            raise DivergedError(
                f"step {step}: loss {loss:g}, gradient norm {norm:g}; {DIVERGED_HINT}"
            )
        clip = manifest.update_clip_norm
        scale = 1.0 if clip == 0 else min(1.0, clip / (norm + 1e-6))
        updates = tuple(self._of(stage)[0].update for stage in range(plan.num_stages))
        return CommitRecord(plan.generation, step, scale, loss, updates)

    def _losses_told(self, plan: Plan, num_microbatches: int) -> dict[int, float]:
        """What any holder of the last stage knows of all microbatches; empty if none is left."""
        slots = range(plan.num_slots)
        order = [mb for slot in slots for mb in range(slot, num_microbatches, plan.num_slots)]
        for _, ready in sorted(self._ready.items()):
            if len(ready.step_losses) == num_microbatches:
                return dict(zip(order, ready.step_losses, strict=True))
        return {}

    def recover(
        self, found: Sequence[Ready], step: int, plan: Plan, manifest: Manifest, *, is_ours: bool
    ) -> CommitRecord | None:
        """The record of a step of which others still have these Readys, if it may be committed.

        Where another coordinated (not `is_ours`), one holder of each stage is enough: it committed
        nothing without a Ready of every holder, so that we find whatever it may have committed.
        """
        for ready in found:
            self.add(ready)
        has_all_stages = len({ready.source.stage for ready in found}) == plan.num_stages
        if not self.is_complete(plan) and (is_ours or not has_all_stages):
            return None
        try:
            return self.commit(step, plan, manifest)
        except (DisagreementError, DivergedError):
            return None  # computed again, it will be found again

    def _check(self, plan: Plan, num_microbatches: int) -> None:
        last = plan.num_stages - 1
        for at, ready in sorted(self._ready.items()):
            owned: tuple[int, ...] = ()
            if plan.computes(at):
                owned = tuple(range(at.slot, num_microbatches, plan.num_slots))
            where, peer = f"stage {at.stage} slot {at.slot}", plan.host(at)
            if tuple(sorted(ready.microbatches)) != owned:
                raise DisagreementError(peer, f"{where} counted {ready.microbatches}, not {owned}")
            if len(ready.losses) != (len(owned) if at.stage == last else 0):
                raise DisagreementError(peer, f"{where} gave {len(ready.losses)} losses")
            if any(value < 0 for _, value in ready.sums_of_squares):
                raise DisagreementError(peer, f"{where} gave a negative sum of squares")
        for stage in range(plan.num_stages):
            self._check_stage(plan, stage)

    def _check_losses(self, plan: Plan) -> None:
        """A loss that is not finite has a gradient that is not: else somebody is wrong."""
        for at, ready in sorted(self._ready.items()):
            if ready.losses and not math.isfinite(mean_loss(ready.losses)):
                where = f"stage {at.stage} slot {at.slot}"
                raise DisagreementError(plan.host(at), f"{where} gave impossible losses")

    def _check_stage(self, plan: Plan, stage: int) -> None:
        """All holders of a stage hold the same gradient; the odd one out is named.

        Sums may differ in rounding between kinds of machines, updates may not.
        """
        said = self._of(stage)
        usual = Counter(ready.update for ready in said).most_common(1)[0][0]
        first = next(ready for ready in said if ready.update == usual)
        for ready in reversed(said):
            if ready.update != usual or not _are_close(
                ready.sums_of_squares, first.sums_of_squares
            ):
                where = f"stage {stage} slot {ready.source.slot}"
                peer = plan.host(ready.source)
                raise DisagreementError(peer, f"{where} holds another gradient than most")

    def _of(self, stage: int) -> list[Ready]:
        """What was said of one stage, in the order of its slots."""
        return [ready for at, ready in sorted(self._ready.items()) if at.stage == stage]


def _are_close(ours: Sequence[tuple[int, float]], theirs: Sequence[tuple[int, float]]) -> bool:
    """Whether sums by group are equal up to rounding, or not finite in the same groups."""
    mine, other = dict(ours), dict(theirs)
    return mine.keys() == other.keys() and all(
        math.isclose(mine[g], other[g], rel_tol=1e-6)
        or not (math.isfinite(mine[g]) or math.isfinite(other[g]))
        for g in mine
    )


def mean_loss(losses: Sequence[float]) -> float:
    """The mean, or NaN where a value is not finite or so large that the sum is not."""
    if not losses or not all(math.isfinite(loss) and abs(loss) < 1e30 for loss in losses):
        return math.nan
    return fmean(losses)
