"""What people want to know of a job: losses, speed, traffic, recoveries. Decides nothing."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from swarmnode.codings import Coding, total
from swarmnode.domain import PeerId
from swarmnode.manifest import Manifest
from swarmnode.messages import (
    SentKind,
    Traffic,
)


class Progress:
    """Figures of one job, fed by its ledger."""

    def __init__(self, manifest: Manifest, now_s: float) -> None:
        batch = manifest.batch
        self.tokens_per_step = batch.rows * batch.sequence_length * manifest.microbatches_per_step
        self.losses: list[float] = []
        """Of each committed step; NaN where nobody is left who knows it."""
        self.validation: list[tuple[int, float]] = []
        self.val_codec = ""
        """Of hidden states in the newest evaluation; empty where nobody knows."""
        self.started_s = now_s
        self.step_s: float | None = None
        self.killed: list[PeerId] = []
        self.recoveries = 0
        self.recovery_s: float | None = None
        self._start_step = manifest.start_step
        self._last_commit_s: float | None = None
        self._lost_s: float | None = None
        self._sent: dict[PeerId, dict[SentKind, int]] = {}
        self._codings: dict[PeerId, tuple[Coding, ...]] = {}
        self._sent_before: dict[SentKind, int] = {}
        self._codings_before: tuple[Coding, ...] = ()

    def committed(self, step: int, loss: float, now_s: float | None) -> None:
        """Step `step` is durable; `now_s` is None when it is read from a journal."""
        del self.losses[step - self._start_step :]
        self.losses.append(loss)
        if now_s is None:
            return
        if self._last_commit_s is not None:
            self.step_s = now_s - self._last_commit_s
        self._last_commit_s = now_s
        self.going_again(now_s)

    def going_again(self, now_s: float) -> None:
        """The job works again after a loss."""
        if self._lost_s is not None:
            self.recovery_s = now_s - self._lost_s
            self._lost_s = None

    def rewind(self, step: int) -> None:
        """Steps from `step` on were given up and will be computed again."""
        del self.losses[step - self._start_step :]
        self.validation = [at for at in self.validation if at[0] <= step]

    def evaluated(self, step: int, loss: float, codec: str) -> None:
        """`codec` is that of hidden states meanwhile; empty if nobody knows."""
        self.val_codec = codec
        self.validation = [at for at in self.validation if at[0] < step]
        self.validation.append((step, loss))

    def is_evaluated(self, step: int) -> bool:
        """Whether the newest evaluation is of the state after `step` committed steps."""
        return bool(self.validation) and self.validation[-1][0] == step

    def lost(self, peer: PeerId, now_s: float) -> None:
        self.killed.append(peer)
        self.recoveries += 1
        if self._lost_s is None:
            self._lost_s = now_s

    def traffic(self, peer: PeerId, traffic: Traffic) -> None:
        """A worker's counters since it took part. They only grow: lower ones are of another life of
        it. Who was only cut off goes on with those that it had."""
        sent, codings = self._sent.get(peer, {}), self._codings.get(peer, ())
        if sum(traffic.bytes_by_kind.values()) < sum(sent.values()):
            self._sent_before = _sums((self._sent_before, sent))
        if _raw_bytes(traffic.codings) < _raw_bytes(codings):
            self._codings_before = total((*self._codings_before, *codings))
        self._sent[peer], self._codings[peer] = dict(traffic.bytes_by_kind), traffic.codings

    @property
    def shown_losses(self) -> tuple[float, ...]:
        """As people see them: one that nobody knows any more is shown as the one before it."""
        shown: list[float] = []
        last = next((loss for loss in self.losses if math.isfinite(loss)), None)
        for loss in self.losses:
            last = loss if math.isfinite(loss) else last
            if last is not None:
                shown.append(last)
        return tuple(shown)

    @property
    def bytes_by_kind(self) -> dict[SentKind, int]:
        return _sums((self._sent_before, *self._sent.values()))

    @property
    def codings(self) -> tuple[Coding, ...]:
        """By kind and codec, of everybody who ever took part."""
        present = (each for codings in self._codings.values() for each in codings)
        return total((*self._codings_before, *present))

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens_per_step / self.step_s if self.step_s else None


def _sums(counters: Iterable[Mapping[SentKind, int]]) -> dict[SentKind, int]:
    """By kind, sorted."""
    found: Counter[SentKind] = Counter()
    for each in counters:
        found.update(each)
    return dict(sorted(found.items()))


def _raw_bytes(codings: Iterable[Coding]) -> int:
    return sum(coding.raw_bytes for coding in codings)
