"""What happens to a job (events) and what its ledger asks of the shell (effects)."""

from dataclasses import dataclass
from typing import Literal

from swarmnode.coordinator.solver.request import Improvement, ImproveRequest
from swarmnode.domain import Advert, BlobRef, Generation, LinkPreset, ModelFacts, PeerId, Plan
from swarmnode.messages import (
    Committed,
    LinkReport,
    Message,
)


@dataclass(frozen=True)
class PeersSeen:
    """The peers that the directory knows now; sent regularly, also when nothing changed."""

    peers: tuple[Advert, ...]
    links: tuple[LinkReport, ...] = ()
    """What this node measured itself."""


@dataclass(frozen=True)
class WorkerLost:
    """The control stream to a worker broke, or it was silent for too long."""

    peer: PeerId
    reason: str


@dataclass(frozen=True)
class Heard:
    """A worker's message arrived."""

    peer: PeerId
    message: Message


@dataclass(frozen=True)
class StateStored:
    """All chunks of a published state are in the coordinator's own store."""

    stage: int
    step: int
    index: BlobRef


@dataclass(frozen=True)
class StateLost:
    """The chunks of a published state could not be fetched."""

    stage: int
    step: int
    index: BlobRef
    reason: str


@dataclass(frozen=True)
class Improved:
    """The solver's answer about `generation`; None if it failed."""

    generation: Generation
    found: Improvement | None


@dataclass(frozen=True)
class Tick:
    """Time passes."""


@dataclass(frozen=True)
class StopAsked:
    """Somebody wants the job to end."""

    reason: str


Event = PeersSeen | WorkerLost | Heard | StateStored | StateLost | Improved | Tick | StopAsked


@dataclass(frozen=True)
class Send:
    """Send `message` to `peer`; an Assign opens the control stream and carries the manifest."""

    peer: PeerId
    message: Message


@dataclass(frozen=True)
class Hangup:
    """Close the control stream to `peer`: it is not part of the job any more."""

    peer: PeerId


@dataclass(frozen=True)
class StoreState:
    """Fetch a published state into the coordinator's own store."""

    stage: int
    step: int
    index: BlobRef
    provider: PeerId


@dataclass(frozen=True)
class Improve:
    """Look for a better placement, aside; the answer is an Improved."""

    request: ImproveRequest


@dataclass(frozen=True)
class SubmittedRecord:
    """The first line of every journal: what whoever takes over cannot find out without torch."""

    facts: ModelFacts


@dataclass(frozen=True)
class HistoryRecord:
    """In place of the `num_lines` lines before the next one: what they came to.

    Several in turn go on from each other.
    """

    num_lines: int
    first_step: int
    losses: tuple[float, ...]
    """Of each committed step, from `first_step` on."""
    validation: tuple[tuple[int, float], ...]
    codec: str = ""
    """Of the newest evaluation, as in its own record."""


@dataclass(frozen=True)
class StartedRecord:
    """A generation begins at `step` committed steps; the rest is its plan."""

    generation: Generation
    step: int
    coordinator: PeerId
    layers: tuple[tuple[int, int], ...]
    slots: tuple[tuple[PeerId, ...], ...]
    shadows: tuple[tuple[PeerId, ...], ...]
    voters: tuple[PeerId, ...]
    voters_before: tuple[PeerId, ...]
    addresses: dict[PeerId, tuple[str, ...]]
    links: tuple[LinkPreset, ...] = ()
    """Absent where an older version wrote it."""

    @staticmethod
    def of(plan: Plan, step: int) -> "StartedRecord":
        return StartedRecord(
            plan.generation, step, plan.coordinator,
            plan.layers, plan.slots, plan.shadows, plan.voters, plan.voters_before,
            dict(plan.addresses), plan.links,
        )  # fmt: skip

    def plan(self) -> Plan:
        """The plan, without what only its own time knew: reasons and predictions."""
        return Plan(
            generation=self.generation,
            layers=self.layers,
            slots=self.slots,
            coordinator=self.coordinator,
            shadows=self.shadows,
            voters=self.voters,
            voters_before=self.voters_before,
            addresses=self.addresses,
            links=self.links,
        )


@dataclass(frozen=True)
class BegunRecord:
    """A majority of the voters before has adopted the plan of `generation`: nobody else can begin
    another one without its voters."""

    generation: Generation


@dataclass(frozen=True)
class CommitRecord:
    """Step `step` is committed."""

    generation: Generation
    step: int
    scale: float
    loss: float
    """NaN where nobody was left who knew it."""
    updates: tuple[BlobRef, ...]
    """For each stage, the index of its reduced gradient as it was broadcast."""

    @property
    def committed(self) -> Committed:
        """What a worker needs of it."""
        return Committed(self.step, self.scale, self.updates)


@dataclass(frozen=True)
class CheckpointRecord:
    """A complete state after `step` committed steps is in the coordinator's store."""

    step: int
    indexes: tuple[BlobRef, ...]
    """One for each stage."""


@dataclass(frozen=True)
class EvaluationRecord:
    """Held-out loss after `step` committed steps."""

    step: int
    loss: float
    codec: str = ""
    """Of the hidden states at the boundaries meanwhile; empty where an older version wrote it."""


@dataclass(frozen=True)
class EndRecord:
    """The job was stopped or failed; it never runs again."""

    phase: Literal["stopped", "failed"]
    reason: str


Record = (
    SubmittedRecord
    | HistoryRecord
    | StartedRecord
    | BegunRecord
    | CommitRecord
    | CheckpointRecord
    | EvaluationRecord
    | EndRecord
)


@dataclass(frozen=True)
class Write:
    """Append `record` to the journal and fsync it before any later effect."""

    record: Record


Effect = Send | Hangup | StoreState | Improve | Write
