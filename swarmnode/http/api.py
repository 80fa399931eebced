"""What the HTTP layer may ask of the node it runs in; the daemon implements it.

Views are plain data, ready for JSON. Every method raises errors of `swarmnode.errors` only.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from swarmnode.codings import Coding
from swarmnode.domain import JobId, PeerId
from swarmnode.p2p.checkpoint_files import Audit
from swarmnode.session_messages import (
    Sampling,
)


@dataclass(frozen=True)
class PeerView:
    """A peer as this node sees it."""

    peer: PeerId
    addresses: tuple[str, ...]
    device: str
    kind: str
    flops: Mapping[str, float]
    memory_bytes_per_s: float
    memory_total_bytes: int
    memory_free_bytes: int
    num_cores: int
    version: str
    expires_in_s: float
    is_self: bool


@dataclass(frozen=True)
class NodeView:
    """This node."""

    peer: PeerId
    version: str
    home: str
    join_address: str
    """What another machine gives to `swarmnode up --join`."""
    transport_addresses: tuple[str, ...]
    http_address: str
    uptime_s: float
    num_peers: int
    device: str
    hosted: tuple[str, ...]
    """Slots hosted here, as `JOB stage/slot`."""
    pids: Mapping[str, int]
    """The node's processes by role: daemon, directory, worker:<job>."""
    dropped: Mapping[str, int]
    """Bad records, refused peers, stale frames and the like, by reason."""


@dataclass(frozen=True)
class Departure:
    """What became of a node's work when it was asked to end: its last word, left in its home.

    Slots are named as `JOB stage/slot`.
    """

    pid: int
    handed_over: tuple[str, ...]
    """Slots that it was released from: others have them, or nobody needs them any more."""
    kept: tuple[str, ...]
    """Slots that it still had in the end: others find out, and go on from what they hold."""
    coordinated: tuple[str, ...]
    """Jobs that it coordinated to the end, and that were not over."""
    in_time: bool
    """Whether coordinators let it go before `drain_s`, or a second request, cut the wait short."""


@dataclass(frozen=True)
class CoarserLink:
    """A directed link whose boundary frames are coded more coarsely than the job asks for."""

    source: PeerId
    target: PeerId
    preset: str
    activation: str
    activation_gradient: str


@dataclass(frozen=True)
class JobView:
    """A job that this node coordinates."""

    job: JobId
    name: str
    kind: str
    phase: str
    """waiting, placing, training, evaluating, saving, serving, failed or stopped."""
    reason: str
    """Why it waits, failed or stopped; empty otherwise."""
    step: int
    """Committed steps."""
    num_steps: int
    loss: float | None
    """Mean training loss of the last committed step, nats per token."""
    first_loss: float | None
    val_loss: float | None
    """Mean held-out loss of the last evaluation, nats per token."""
    step_s: float | None
    """Seconds between the last two commits."""
    predicted_step_s: float | None
    """What a step of this placement should take, by what its machines have measured."""
    bound_step_s: float | None
    """No placement of these machines has a faster step; null where nobody knows."""
    tokens_per_s: float | None
    tokens_total: int
    elapsed_s: float
    bytes_by_kind: Mapping[str, int]
    """Sent by all workers: activation, activation_gradient, gradient, reduced, blob, control."""
    generation: int
    recoveries: int
    """Times that a lost worker was replaced."""
    recovery_s: float | None
    """Seconds from the last loss of a worker to the next commit."""
    killed_peers: tuple[PeerId, ...]
    placement: tuple[tuple[PeerId, ...], ...]
    """placement[stage][slot]; empty while there is none."""
    layers: tuple[tuple[int, int], ...]
    plan_reasons: tuple[str, ...]
    plan_verdict: str
    """Why the newest placement that was looked at is not taken; empty if nothing was found."""
    checkpoint_step: int | None
    """Committed steps that the newest complete checkpoint holds."""
    losses: tuple[float, ...] = field(default=(), repr=False)
    """Mean loss of each committed step; left out of lists of jobs."""
    codecs: Mapping[str, str] = field(default_factory=dict)
    """Of activation, activation_gradient and gradient."""
    val_codec: str | None = None
    """What the boundaries were coded with in the last evaluation."""
    codings: tuple[Coding, ...] = ()
    """What coding came to so far, by kind and codec, of all workers."""
    coarser_links: tuple[CoarserLink, ...] = ()
    """Links that carry boundary frames with other codecs than `codecs`, in this generation."""


@dataclass(frozen=True)
class CheckpointView:
    """A checkpoint that is kept."""

    step: int
    generation: int
    created_at_s: float
    loss: float | None
    num_atoms: int
    num_bytes: int
    weights_sha256: str
    sha256: str
    """Of its manifest: what the next one names as its parent."""
    parent: str | None
    coordinator: str
    """Who signed it."""
    codecs: Mapping[str, str] = field(default_factory=dict)
    """What it was trained with: of activation, activation_gradient and gradient."""
    coarser_links: tuple[CoarserLink, ...] = ()
    """Links that had other codecs at their boundaries when it was recorded."""


@dataclass(frozen=True)
class Work:
    """How far a long piece of work is; the last one carries what came of it."""

    done_bytes: int
    total_bytes: int
    audits: tuple[Audit, ...] | None = None
    """After a verify."""
    step: int | None = None
    """After an export: committed steps in the folder."""


@dataclass(frozen=True)
class Token:
    """One generated token."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token, logprob) of the likeliest tokens, when asked for."""


class ModelView(Protocol):
    """A served model: what is needed to turn requests into token ids and back."""

    @property
    def name(self) -> str: ...
    @property
    def job(self) -> JobId: ...
    @property
    def created_s(self) -> float: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def chat_template(self) -> str | None: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: list[int]) -> str: ...
    @property
    def end_tokens(self) -> frozenset[int]: ...


class NodeApi(Protocol):
    """The verbs of a node."""

    def node(self) -> NodeView: ...

    def peers(self) -> tuple[PeerView, ...]: ...

    def finish(self) -> None:
        """Ask the node to give its work to others and end; returns at once."""

    def jobs(self) -> tuple[JobView, ...]: ...

    def job(self, job: str) -> JobView:
        """By id, by unique prefix of it, or by name (the newest). Raises: NotFoundError."""

    async def submit(self, raw: dict[str, Any], base: Path) -> JobId:
        """Take a job description (the parsed TOML); `base` is what its paths are relative to.

        Raises: ManifestError, DataError, CapacityError, each one clear line.
        """

    def watch(self, job: str) -> AsyncIterator[JobView]:
        """The job now, and again whenever it changes, until it serves, failed or stopped."""

    async def stop(self, job: str) -> None:
        """Release the job's workers; its checkpoints stay."""

    async def export(self, job: str, directory: Path) -> int:
        """Write a Hugging Face folder; the number of committed steps it holds.

        Raises: BusyError if the folder exists and is not empty, NotFoundError.
        """

    def notes(self, job: str) -> tuple[str, ...]:
        """What the submitter of a job should know, a line each."""

    async def checkpoints(self, job: str) -> tuple[CheckpointView, ...]:
        """The checkpoints that are kept, the oldest first. Raises: NotFoundError, DataError."""

    def verify_checkpoints(self, job: str) -> AsyncIterator[Work]:
        """Check every byte of every kept checkpoint; closing the iterator ends it."""

    def export_checkpoint(self, job: str, directory: Path, step: int | None) -> AsyncIterator[Work]:
        """Write a checkpoint, the newest unless `step` is given, as a folder that stands alone.

        Raises: BusyError if the folder exists and is not empty, NotFoundError.
        """

    def models(self) -> tuple[ModelView, ...]: ...

    async def model(self, name: str) -> ModelView:
        """By name or job id; waits a while for a job that is just moved. Raises: NotFoundError."""

    def generate(
        self, model: ModelView, prompt: list[int], max_tokens: int, sampling: Sampling
    ) -> AsyncIterator[Token]:
        """Tokens as the swarm makes them; ends at an end token (not yielded) or `max_tokens`.

        Closing the iterator frees the session on every stage. Raises: CapacityError when the
        prompt does not fit or another conversation is in progress, PeerError when the route
        breaks.
        """
