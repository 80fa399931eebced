"""Every message, as a frozen dataclass whose types are its schema; `wire` turns them into bytes."""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from swarmnode.domain import BlobRef, Generation, JobId, PeerId, Plan, SlotId

Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 62)]
Fence = Annotated[Generation, Field(strict=True, ge=0, lt=1 << 62)]
"""The generation that a message belongs to."""
Hash = Annotated[str, Field(min_length=8, max_length=64, pattern=r"^[0-9a-f]+$")]
MAX_LINK_REPORTS = 256
Text = Annotated[str, Field(max_length=4096)]
SentKind = Literal[
    "activation", "activation_gradient", "gradient", "reduced", "session", "control", "blob"
]
"""What bytes on the wire are counted as."""
Seconds = Annotated[float, Field(ge=0, le=60)]
Speed = Annotated[float, Field(gt=0, le=1e12)]
"""Bytes per second."""
FrameKind = Literal["activation", "activation_gradient", "gradient", "reduced"]


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


@dataclass(frozen=True)
class Announce:
    """The next message on this stream is large and follows at once: a good one to time."""

    job: JobId


class Sampling(NamedTuple):
    """How the last stage picks a token; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    num_logprobs: int = 0


@dataclass(frozen=True)
class SessionFrame:
    """One piece of a conversation on its way through the stages.

    The payload is int64 token ids for stage 0 and coded hidden states for later stages.
    It holds positions [start, stop); a stage whose cache does not end at `start` refuses.
    """

    job: JobId
    generation: Fence
    session: Annotated[str, Field(min_length=1, max_length=64)]
    target: SlotId
    start: Count
    stop: Count
    shape: Annotated[tuple[Count, ...], Field(max_length=8)]
    sampling: Sampling
    max_positions: Count
    """The longest that this session may become."""


@dataclass(frozen=True)
class SessionToken:
    """The last stage's answer to a SessionFrame: the token at position `position`."""

    job: JobId
    generation: Fence
    session: Annotated[str, Field(min_length=1, max_length=64)]
    position: Count
    token: Count
    logprob: float
    top: Annotated[tuple[tuple[int, float], ...], Field(max_length=32)] = ()


@dataclass(frozen=True)
class SessionFailed:
    """A stage cannot go on with a session: its cache is gone or there is no room."""

    job: JobId
    generation: Fence
    session: Annotated[str, Field(min_length=1, max_length=64)]
    reason: Text


@dataclass(frozen=True)
class SessionClose:
    """The head is done with a session: free its cache, and pass this on to the next stage."""

    job: JobId
    generation: Fence
    session: Annotated[str, Field(min_length=1, max_length=64)]
    target: SlotId


# ---- coordinator -> worker ---------------------------------------------------------------------


@dataclass(frozen=True)
class StateSource:
    """Where a stage's state at a step comes from.

    keep: the worker has it. init: made from the manifest's seed. fetch: a tensor index whose
    chunks `providers` serve (an index without optimizer moments starts them at zero).
    """

    how: Literal["keep", "init", "fetch"]
    index: BlobRef | None = None
    providers: tuple[PeerId, ...] = ()


@dataclass(frozen=True)
class Assign:
    """Take these slots in a new generation, with the state after `step` committed steps.

    The payload is the canonical manifest; `signature` is the submitter's, over those bytes.
    """

    job: JobId
    plan: Plan
    step: Count
    sources: Annotated[tuple[tuple[int, StateSource], ...], Field(max_length=256)]
    """(stage, source) for each stage of which the receiver hosts a slot."""
    signature: bytes


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


@dataclass(frozen=True)
class Save:
    """Publish the state of `stage` after `step` committed steps as chunks."""

    job: JobId
    generation: Fence
    step: Count
    stage: Count


@dataclass(frozen=True)
class Release:
    """Forget the job: free its memory."""

    job: JobId
    reason: Text


@dataclass(frozen=True)
class Ping:
    """Sent every heartbeat by both sides; silence means death."""

    job: JobId


# ---- worker -> coordinator ---------------------------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """All slots of this worker are ready to compute step `step`."""

    job: JobId
    generation: Fence
    step: Count


@dataclass(frozen=True)
class Failed:
    """This worker cannot do what the generation asks of it."""

    job: JobId
    generation: Fence
    reason: Text


@dataclass(frozen=True)
class Ready:
    """A slot has counted all its microbatches and holds the whole reduced gradient.

    `digest` is over the reduced gradient's bytes: equal for every slot of a stage.
    `sums_of_squares` has one (group, value) for each reduction group that the slot is in.
    """

    job: JobId
    generation: Fence
    step: Count
    source: SlotId
    microbatches: Annotated[tuple[Count, ...], Field(max_length=4096)]
    digest: Hash
    sums_of_squares: Annotated[tuple[tuple[int, float], ...], Field(max_length=8)]
    losses: Annotated[tuple[float, ...], Field(max_length=4096)]
    """Mean loss of each microbatch, in nats per token; empty except at the last stage."""


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
    """What a worker has sent so far, how busy it was, and what it has measured of its links.

    Sent with each step. `links` are those to other peers of the plan.
    """

    job: JobId
    bytes_by_kind: dict[SentKind, Count]
    compute_s: float
    """Seconds of computing since the last report."""
    links: Annotated[tuple[LinkReport, ...], Field(max_length=MAX_LINK_REPORTS)] = ()


@dataclass(frozen=True)
class LinkBroken:
    """A stream to another worker of the plan broke."""

    job: JobId
    generation: Fence
    peer: PeerId
    reason: Text


# ---- daemon <-> worker child -------------------------------------------------------------------


@dataclass(frozen=True)
class Configure:
    """Make the child ready for a generation; the payload is the canonical manifest.

    `sources` gives (stage, how, path): how is keep, init or load; load reads the file `path`.
    The token chunks of the manifest's data are in `blob_directory`.
    """

    job: JobId
    peer: PeerId
    plan: Plan
    step: Count
    sources: tuple[tuple[int, Literal["keep", "init", "load"], str], ...]
    blob_directory: str
    num_threads: int
    device: str


@dataclass(frozen=True)
class Configured:
    """The child is ready to compute step `step` of the generation."""

    job: JobId
    generation: Fence
    step: Count


@dataclass(frozen=True)
class Export:
    """Write the state of `stage` after `step` committed steps to the file `path`."""

    job: JobId
    generation: Fence
    step: Count
    stage: Count
    path: str


@dataclass(frozen=True)
class Exported:
    """The file is complete and named."""

    job: JobId
    generation: Fence
    step: Count
    stage: Count
    path: str


@dataclass(frozen=True)
class Busy:
    """Seconds of computing since the last report of the child."""

    job: JobId
    compute_s: float


Message = (
    Frame | Announce | SessionFrame | SessionToken | SessionFailed | SessionClose
    | Assign | Begin | Commit | Save | Release | Ping
    | Placed | Failed | Ready | Evaluated | Applied | Saved | Traffic | LinkBroken
    | Configure | Configured | Export | Exported | Busy
)  # fmt: skip
