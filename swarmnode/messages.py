"""Every message, as a frozen dataclass whose types are its schema; `wire` turns them into bytes."""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from swarmnode.codings import MAX_CODINGS, Coding
from swarmnode.domain import BlobRef, Generation, JobId, PeerId, Plan, SlotId
from swarmnode.fields import Count, Fence, Hash, Losses, Proof, Seconds, Speed, Text
from swarmnode.fields import FrameKind as FrameKind
from swarmnode.fields import SentKind as SentKind
from swarmnode.handovers import HandOver, Leaving, StandingBy
from swarmnode.heartbeats import Checking, Ping
from swarmnode.session_messages import SessionClose, SessionFailed, SessionFrame, SessionToken

BEFORE_ANY = Generation(0)  # below every generation
MAX_LINK_REPORTS = 256
MAX_ENTRY_BYTES = 1 << 19


# ---- tensors between workers -------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """One tensor of one step, addressed to one slot; the payload is the coded tensor."""

    job: JobId
    generation: Fence
    step: Count
    kind: FrameKind
    source: SlotId
    target: SlotId
    microbatch: Count
    """The microbatch of the step; 0 for gradient and reduced."""
    group: Count
    """The reduction group; 0 for activations and their gradients."""
    part: Count
    """The shard of the group's flat gradient; 0 for activations and their gradients."""
    shape: Annotated[tuple[Count, ...], Field(max_length=8)]
    evaluate: bool = False
    """Whether the step is an evaluation: forward only, nothing kept."""
    losses: Losses = ()
    """At the last stage: of the slot in a gradient, of all slots in turn in a reduced one."""


@dataclass(frozen=True)
class Announce:
    """The next message on this stream is large and follows at once: a good one to time."""

    job: JobId


# ---- coordinator -> worker ---------------------------------------------------------------------


@dataclass(frozen=True)
class StateSource:
    """Where the state of a stage after some committed steps comes from; the log does the rest.

    keep: what the worker holds, in memory or on its disk. init: the manifest's seed, or its own
    start. fetch: a tensor index (without optimizer moments they start at zero).
    Updates that the worker lacks between `step` and the assignment's come from `providers`, as
    the chunks of the index do.
    """

    how: Literal["keep", "init", "fetch"]
    step: Count = 0
    """Committed steps that the source holds; with keep, at least so many."""
    index: BlobRef | None = None
    providers: Annotated[tuple[PeerId, ...], Field(max_length=64)] = ()


class Committed(NamedTuple):
    """What turns the update of a step into a change of the state."""

    step: Count
    scale: float
    updates: Annotated[tuple[BlobRef, ...], Field(max_length=256)]
    """For each stage the index of its update, by content; see swarmnode.updates."""


MAX_COMMITTED = 1024
"""Steps that a worker may lag behind and still catch up from the log."""


@dataclass(frozen=True)
class Inquire:
    """May I begin `generation` of this job, and what do you hold of it?

    The first message on a control stream carries the canonical manifest as payload, signed.
    """

    job: JobId
    generation: Fence
    based_on: Fence
    """The last one that the sender knows; who knows a later one refuses. `generation` itself once
    a majority has granted it: nothing else can begin any more."""
    num_lines: Count
    """Lines of the job's journal that the sender has; who has more does not grant, either."""
    signature: bytes
    lease: Proof = b""
    """Why the sender may ask, if it is not the submitter (see swarmnode.p2p.lease)."""

    @property
    def is_agreed(self) -> bool:
        """Whether a majority has granted it already."""
        return self.based_on == self.generation


@dataclass(frozen=True)
class Assign:
    """Take these slots in a new generation, with the state after `step` committed steps.

    The payload is the canonical manifest; `signature` is the submitter's, over those bytes.
    """

    job: JobId
    plan: Plan
    step: Count
    sources: Annotated[tuple[tuple[int, StateSource], ...], Field(max_length=256)]
    """(stage, source) for each stage of which the receiver hosts a slot or is a shadow."""
    signature: bytes
    commits: Annotated[tuple[Committed, ...], Field(max_length=MAX_COMMITTED)] = ()
    """The last committed steps, without gaps, up to `step` - 1; enough for every source."""
    lease: Proof = b""


@dataclass(frozen=True)
class Adopt:
    """A voter of the plan before that has no part in `plan` remembers that this one follows."""

    job: JobId
    plan: Plan
    lease: Proof = b""


@dataclass(frozen=True)
class Prepare:
    """Fetch what you will need to take these slots of `plan` later, while the job goes on.

    `plan` has the generation at hand; nothing of it is adopted.
    """

    job: JobId
    plan: Plan
    step: Count
    sources: Annotated[tuple[tuple[int, StateSource], ...], Field(max_length=256)]


@dataclass(frozen=True)
class Begin:
    """Compute step `step`; with `evaluate`, forward only, over held-out microbatches."""

    job: JobId
    generation: Fence
    step: Count
    evaluate: bool = False


@dataclass(frozen=True)
class Commit:
    """Step `step` is durable: scale the reduced gradients, apply the optimizer."""

    job: JobId
    generation: Fence
    step: Count
    scale: float
    snapshot: bool = False
    """Write the state after this step to the disk, aside; the log before it may go."""


@dataclass(frozen=True)
class Entry:
    """Lines of the job's journal, from line `number` on, for those who may have to take over."""

    job: JobId
    generation: Fence
    number: Count
    lines: Annotated[bytes, Field(max_length=MAX_ENTRY_BYTES)]


@dataclass(frozen=True)
class Save:
    """Publish the state of `stage` after `step` committed steps as chunks."""

    job: JobId
    generation: Fence
    step: Count
    stage: Count
    readers: Annotated[tuple[PeerId, ...], Field(max_length=4096)] = ()
    """Who will fetch it although no plan names them yet."""


@dataclass(frozen=True)
class Release:
    """Forget the job: free its memory."""

    job: JobId
    reason: Text
    is_over: bool = False
    """Whether nobody works for the job any more, and nobody ever will again."""


# ---- worker -> coordinator ---------------------------------------------------------------------


class Held(NamedTuple):
    """What a worker holds of one stage, in memory or on its disk."""

    stage: Count
    start: Count
    stop: Count
    """The stage's layers."""
    step: Count
    """Committed steps that the state holds."""
    log_from: Count
    log_to: Count
    """Updates of steps [log_from, log_to) are in the log, the last one perhaps not committed."""
    first: BlobRef | None = None
    """The update of step `log_from`, if it is in the log."""
    last: BlobRef | None = None
    """The one that led to `step`, if it is in the log: another history has another one."""


@dataclass(frozen=True)
class Answer:
    """The answer to an Inquire, or to an Assign of a generation that is too low."""

    job: JobId
    generation: Fence
    """The one that was asked for."""
    granted: bool
    promised: Fence
    """The highest generation that this worker has promised; nothing lower will be served."""
    promised_to: PeerId
    held: Annotated[tuple[Held, ...], Field(max_length=256)]
    ready: "Annotated[tuple[Ready, ...], Field(max_length=256)]"
    """What it said last, of a step whose updates are in its log, committed or not."""
    vote: Annotated[bytes, Field(max_length=64)] = b""
    """The worker's signature, where another than the coordinator so far asks."""
    is_warm: bool = True
    """Whether it can compute at once; starting the process that does takes seconds."""
    in_touch: bool = True
    """Whether `promised_to` talks to the worker still, or has let it go."""
    is_new: bool = False
    """Whether it knows no plan of the job: a voter that knows none has lost its disk."""
    is_over: bool = False
    """Whether it was told that the job has ended."""
    adopted: Fence = BEFORE_ANY
    """The generation of the last plan that it adopted, whether that one has begun or not."""


@dataclass(frozen=True)
class Placed:
    """All slots of this worker are ready to compute step `step`."""

    job: JobId
    generation: Fence
    step: Count


@dataclass(frozen=True)
class Adopted:
    """The answer to Adopt: the plan is on this voter's disk."""

    job: JobId
    generation: Fence


@dataclass(frozen=True)
class Prepared:
    """The answer to Prepare: everything is on this worker's disk, or why it is not."""

    job: JobId
    generation: Fence
    step: Count
    failure: Text = ""


@dataclass(frozen=True)
class Failed:
    """This worker cannot do what the generation asks of it, by the fault of `blames` if given."""

    job: JobId
    generation: Fence
    reason: Text
    child_ended: bool = False
    """The process that computes has ended: another one can be had at once."""
    blames: SlotId | None = None
    is_diverged: bool = False
    """A value is not finite, so that it cannot be coded, or used."""
    is_mismatch: bool = False
    """What `blames` sent does not follow from the history that this worker holds: either may be
    wrong, and a generation begins without any."""


@dataclass(frozen=True)
class Ready:
    """A slot has counted all its microbatches and holds the whole reduced gradient.

    `update` names the reduced gradient as it was broadcast: equal for every slot of a stage. The
    worker has it in its log by then, also as a shadow, which counts no microbatches.
    `sums_of_squares` has one (group, value) for each reduction group that the slot is in.
    """

    job: JobId
    generation: Fence
    step: Count
    source: SlotId
    microbatches: Annotated[tuple[Count, ...], Field(max_length=4096)]
    update: BlobRef
    sums_of_squares: Annotated[tuple[tuple[int, float], ...], Field(max_length=8)]
    losses: Losses
    """Of the slot's microbatches; empty except at the last stage."""
    step_losses: Losses = ()
    """Of all microbatches, slot by slot: every holder of the last stage knows them."""


@dataclass(frozen=True)
class Evaluated:
    """A slot of the last stage has evaluated its share of the held-out microbatches."""

    job: JobId
    generation: Fence
    step: Count
    source: SlotId
    losses: Annotated[tuple[float, ...], Field(max_length=65536)]


@dataclass(frozen=True)
class Applied:
    """The optimizer was applied; `state_hash` is over the stage's weights."""

    job: JobId
    generation: Fence
    step: Count
    stage: Count
    state_hash: Hash


@dataclass(frozen=True)
class Saved:
    """The answer to Save: the chunks of `index` can be fetched from the sender."""

    job: JobId
    generation: Fence
    step: Count
    stage: Count
    index: BlobRef


class LinkReport(NamedTuple):
    """A directed path, as the sender of the report knows it."""

    peer: PeerId
    """Where the path leads."""
    latency_s: Seconds
    """One way."""
    bytes_per_s: Speed | None = None
    """None where too little has been sent to tell."""


@dataclass(frozen=True)
class Traffic:
    """What a worker has sent and coded so far, how busy it was, and what its links are like.

    Sent with each step. `links` are those to other peers of the plan.
    """

    job: JobId
    bytes_by_kind: dict[SentKind, Count]
    compute_s: float
    """Seconds of computing since the last report."""
    links: Annotated[tuple[LinkReport, ...], Field(max_length=MAX_LINK_REPORTS)] = ()
    codings: Annotated[tuple[Coding, ...], Field(max_length=MAX_CODINGS)] = ()
    is_moving: bool = False
    """Whether anything has left since the last report, if only a part of a message."""


@dataclass(frozen=True)
class LinkBroken:
    """A stream to another worker of the plan broke."""

    job: JobId
    generation: Fence
    peer: PeerId
    reason: Text


Message = (
    Frame | Announce | SessionFrame | SessionToken | SessionFailed | SessionClose
    | Inquire | Assign | Adopt | Prepare | Begin | Commit | Entry | Save | Release | HandOver | Ping
    | Answer | Placed | Adopted | Prepared | Failed | Ready | Evaluated | Applied | Saved | Traffic
    | Leaving | StandingBy | Checking | LinkBroken
)  # fmt: skip
