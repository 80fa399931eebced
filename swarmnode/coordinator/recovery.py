"""Where each holder of a stage gets the stage's state: what it has, a checkpoint, and the log."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from swarmnode.codec_specs import wire_share
from swarmnode.coordinator.events import CheckpointRecord
from swarmnode.domain import BlobRef, ModelFacts, PeerId
from swarmnode.manifest import Manifest
from swarmnode.messages import (
    MAX_COMMITTED,
    Answer,
    Committed,
    Held,
    StateSource,
)

STATE_BYTES_PER_WEIGHT = 12
"""A float32 weight and its two moments, as a snapshot stores them."""
LOG_SHARE = 2.0
"""A snapshot is taken when the log since the last one is about so many times as large as it."""
MAX_PROVIDERS = 16
MAX_ASSIGNED_UPDATES = 5000
"""Updates of all stages together that one assignment may name: it must fit the header of a control
message, beside the longest lease and the plan."""


class CommitLog:
    """The last committed steps: what turns updates into state."""

    def __init__(self) -> None:
        self._recent: list[Committed] = []

    def add(self, commit: Committed) -> None:
        if self._recent and commit.step != self._recent[-1].step + 1:
            self._recent.clear()
        self._recent.append(commit)
        del self._recent[:-MAX_COMMITTED]

    def rewind(self, step: int) -> None:
        """Steps from `step` on are given up."""
        self._recent = [commit for commit in self._recent if commit.step < step]

    def contradicts(self, stage: int, step: int, update: BlobRef | None) -> bool:
        """Whether another update of that step was committed; False where it is not known."""
        known = (c.updates[stage] for c in self._recent if c.step == step and update is not None)
        return any(committed != update for committed in known)

    def since(self, start: int, stop: int) -> tuple[Committed, ...] | None:
        """The commits of [start, stop), None if they are not all known."""
        found = tuple(commit for commit in self._recent if start <= commit.step < stop)
        return found if len(found) == stop - start else None


@dataclass(frozen=True)
class Origin:
    """A complete state that the coordinator can give out: a checkpoint, or the job's beginning."""

    step: int
    sources: tuple[StateSource, ...]
    """For each stage."""


def origin(checkpoint: CheckpointRecord | None, manifest: Manifest, me: PeerId) -> Origin:
    """The newest complete state; `me` serves it."""
    stages = range(manifest.placement.stages)
    if checkpoint is not None:
        step = checkpoint.step
        found = [StateSource("fetch", step, checkpoint.indexes[stage], (me,)) for stage in stages]
        return Origin(step, tuple(found))
    weights, step = manifest.model.weights, manifest.start_step
    begun = StateSource("init") if weights is None else StateSource("fetch", step, weights, (me,))
    return Origin(step, tuple(begun for _ in stages))


def state_bytes(facts: ModelFacts, layers: Sequence[tuple[int, int]], stage: int) -> int:
    """Of a snapshot of one stage."""
    (start, stop), is_first, is_last = layers[stage], stage == 0, stage == len(layers) - 1
    copy = facts.first_weights if facts.tied and is_last and not is_first else 0
    ends = facts.first_weights * is_first + facts.last_weights * is_last + copy
    return STATE_BYTES_PER_WEIGHT * ((stop - start) * facts.layer_weights + ends)


def snapshot_every(manifest: Manifest) -> int:
    """Steps between snapshots, by how large an update is beside the state."""
    codecs = manifest.codecs
    update_bytes = 4.0 * wire_share(codecs.share)
    if codecs.gathers:
        update_bytes *= manifest.placement.slots
    return max(4, min(64, round(LOG_SHARE * STATE_BYTES_PER_WEIGHT / update_bytes)))


@dataclass
class Sources:
    """How every holder of a grid gets to the step at hand."""

    by_peer: dict[PeerId, list[tuple[int, StateSource]]] = field(default_factory=dict)
    saves: dict[int, tuple[PeerId, int]] = field(default_factory=dict)
    """stage -> (holder, step): the state that must first be published."""
    waiting: list[tuple[int, PeerId]] = field(default_factory=list)
    """(stage, holder) that wait for such a state."""
    lost: list[int] = field(default_factory=list)
    """Stages whose state nobody who answered can give."""
    first_step: int = 0
    """The oldest step that any source starts from."""

    def add(self, peer: PeerId, stage: int, source: StateSource) -> None:
        self.by_peer.setdefault(peer, []).append((stage, source))
        self.first_step = min(self.first_step, source.step)


class Finder:
    """Finds sources among what was answered; `step` committed steps is where all must get."""

    def __init__(
        self,
        answers: Mapping[PeerId, Answer],
        layers: Sequence[tuple[int, int]],
        step: int,
        commits: CommitLog,
        beginning: Origin,
        odd: Mapping[int, frozenset[PeerId]] = MappingProxyType({}),
    ) -> None:
        """`odd`: of stages whose holders disagree, those that differ from most. Such a stage is
        derived from the log; where that does not reach back so far, the others have it."""
        self.layers = layers
        self._step = step
        self._commits = commits
        self._origin = beginning
        self._odd = odd
        self._held: list[dict[PeerId, Held]] = [{} for _ in layers]
        for peer, answer in answers.items():
            for held in answer.held:
                at = held.stage
                if at < len(layers) and layers[at] == (held.start, held.stop):
                    self._held[at][peer] = held

    def holds(self, stage: int, peer: PeerId) -> bool:
        """Whether `peer` can get to the step from what it has, with the others' logs."""
        return self._kept(stage, peer) is not None

    def is_held(self, stage: int) -> bool:
        """Whether anybody can get to the step from what it has."""
        return any(self.holds(stage, peer) for peer in self._held[stage])

    def find(self, holders: Sequence[Sequence[PeerId]]) -> Sources:
        """A source for each peer of `holders[stage]`, as far as there is one."""
        found = Sources(first_step=self._step)
        for stage, peers in enumerate(holders):
            start = self._origin.sources[stage]
            for peer in sorted(set(peers)):
                kept = self._kept(stage, peer)
                if kept is not None:
                    found.add(peer, stage, kept)
                elif self._reaches(stage, self._origin.step):
                    providers = self._providers(stage, start.providers)
                    source = StateSource(start.how, self._origin.step, start.index, providers)
                    found.add(peer, stage, source)
                else:
                    self._ask_a_holder(stage, peer, found)
        return found

    def _ask_a_holder(self, stage: int, peer: PeerId, found: Sources) -> None:
        able = [
            (held.step, holder)
            for holder, held in sorted(self._held[stage].items())
            if (kept := self._kept(stage, holder)) is not None and kept.step == held.step
        ]
        if not able:
            found.lost.append(stage)
            return
        step, holder = max(able)
        found.saves[stage] = (holder, step)
        found.first_step = min(found.first_step, step)
        found.waiting.append((stage, peer))

    def _kept(self, stage: int, peer: PeerId) -> StateSource | None:
        held = self._held[stage].get(peer)
        if held is None or not self._is_trusted(stage, peer):
            return None
        # Ahead of us, or of another history: what it applied was never agreed on. It still has
        # what its log begins with.
        bases = ((held.step, held.step - 1, held.last), (held.log_from, held.log_from, held.first))
        for step, at, update in bases:
            if step <= self._step and not self._commits.contradicts(stage, at, update):
                is_enough = self._reaches(stage, step)
                return self._keep(stage, step) if is_enough else None
        return None

    def _keep(self, stage: int, step: int) -> StateSource:
        return StateSource("keep", step, None, self._providers(stage, ()))

    def _is_trusted(self, stage: int, peer: PeerId) -> bool:
        odd = self._odd.get(stage)
        if odd is None:
            return True
        is_alone = self._held[stage].keys() <= odd  # a state in doubt is better than none
        return (is_alone or peer not in odd) and not self._reaches(stage, self._origin.step)

    def _reaches(self, stage: int, start: int) -> bool:
        """Whether the updates from step `start` on are known and in somebody's log."""
        too_many = (self._step - start) * len(self._held) > MAX_ASSIGNED_UPDATES
        if start > self._step or too_many or self._commits.since(start, self._step) is None:
            return False
        missing = set(range(start, self._step))
        for held in self._held[stage].values():
            is_another = self._commits.contradicts(stage, held.step - 1, held.last)
            if not is_another:
                missing -= set(range(held.log_from, held.log_to))
        return not missing

    def _providers(self, stage: int, first: Sequence[PeerId]) -> tuple[PeerId, ...]:
        return tuple(dict.fromkeys((*first, *sorted(self._held[stage]))))[:MAX_PROVIDERS]
