"""What workers say of a step: when it is complete, whether they agree, what it adds up to."""

import math
from statistics import fmean

from swarmnode.coordinator.events import CommitRecord
from swarmnode.domain import PeerId, Plan, SlotId
from swarmnode.errors import SwarmError
from swarmnode.manifest import Manifest
from swarmnode.messages import Applied, Ready


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

    def commit(self, step: int, plan: Plan, manifest: Manifest) -> CommitRecord:
        """What is to be journaled: the clip scale as in torch's clip_grad_norm_, and the loss.

        Raises: DisagreementError, DivergedError.
        """
        self._check(plan, manifest.batch.num_microbatches)
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
        clip = manifest.optimizer.clip_norm
        scale = 1.0 if clip == 0 else min(1.0, clip / (norm + 1e-6))
        digests = tuple(self._ready[SlotId(s, 0)].digest for s in range(plan.num_stages))
        return CommitRecord(plan.generation, step, scale, loss, digests)

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


class StateHashes:
    """Weights after each step, as hashes: replicas of a stage must hold the same."""

    def __init__(self) -> None:
        self._first: dict[tuple[int, int], tuple[str, PeerId]] = {}

    def clear(self) -> None:
        self._first.clear()

    def differs_from(self, peer: PeerId, applied: Applied) -> PeerId | None:
        """Who said another hash before, if anybody did."""
        at = (applied.step, applied.stage)
        state_hash, first = self._first.setdefault(at, (applied.state_hash, peer))
        for old in [known for known in self._first if known[0] < applied.step - 2]:
            del self._first[old]
        return None if state_hash == applied.state_hash else first
