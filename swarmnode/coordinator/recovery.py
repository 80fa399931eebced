"""Where each holder of a stage gets the stage's state: what it has, a checkpoint, and the log."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from swarmnode.codec_specs import wire_share
from swarmnode.coordinator.events import CheckpointRecord
from swarmnode.domain import PeerId
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
        distrusted: frozenset[int] = frozenset(),
    ) -> None:
        """`distrusted`: stages whose holders disagree; their state is derived from the log."""
        self._step = step
        self._commits = commits
        self._origin = beginning
        self._distrusted = distrusted
        self._held: list[dict[PeerId, Held]] = [{} for _ in layers]
        for peer, answer in answers.items():
            for held in answer.held:
                at = held.stage
                if at < len(layers) and layers[at] == (held.start, held.stop):
                    self._held[at][peer] = held

    def holds(self, stage: int, peer: PeerId) -> bool:
        """Whether `peer` can get to the step from what it has, with the others' logs."""
        return self._kept(stage, peer) is not None

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
            if held.step <= self._step and self.holds(stage, holder)
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
        if held is None or stage in self._distrusted:
            return None
        # Ahead of us: what it applied was never agreed on. It still has what its log begins with.
        step = held.step if held.step <= self._step else held.log_from
        if step > self._step or not self._reaches(stage, step):
            return None
        return StateSource("keep", step, None, self._providers(stage, ()))

    def _reaches(self, stage: int, start: int) -> bool:
        """Whether the updates from step `start` on are known and in somebody's log."""
        too_many = (self._step - start) * len(self._held) > MAX_ASSIGNED_UPDATES
        if start > self._step or too_many or self._commits.since(start, self._step) is None:
            return False
        missing = set(range(start, self._step))
        for held in self._held[stage].values():
            missing -= set(range(held.log_from, held.log_to))
        return not missing

    def _providers(self, stage: int, first: Sequence[PeerId]) -> tuple[PeerId, ...]:
        return tuple(dict.fromkeys((*first, *sorted(self._held[stage]))))[:MAX_PROVIDERS]
