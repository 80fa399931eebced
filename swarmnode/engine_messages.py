"""What a daemon and its worker child tell each other, besides the messages of `messages`."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from swarmnode.codings import Coding
from swarmnode.domain import JobId, PeerId, Plan
from swarmnode.fields import Count, Fence


class Replay(NamedTuple):
    """An update to apply again."""

    step: Count
    scale: float
    path: str
    """Its payloads, one after the other, as they were broadcast."""


class Base(NamedTuple):
    """Where a child takes a stage's state from; `replays` bring it to the assigned step."""

    stage: Count
    how: Literal["keep", "init", "load"]
    step: Count
    """Committed steps before the first replay."""
    path: str = ""
    """The safetensors file, with load."""
    replays: tuple[Replay, ...] = ()


@dataclass(frozen=True)
class Warm:
    """The child has imported its libraries: what it is told, it does at once. Its first message."""


@dataclass(frozen=True)
class Configure:
    """Make the child ready for a generation; the payload is the canonical manifest.

    The token chunks of the manifest's data are in `blob_directory`. Snapshots and updates of
    stage s are written to `log_directory`/stage-s; files without a name are in `log_directory`.
    """

    job: JobId
    peer: PeerId
    plan: Plan
    step: Count
    bases: tuple[Base, ...]
    blob_directory: str
    log_directory: str
    num_threads: int
    device: str
    trace_directory: str = ""
    """Where the child writes its spans; nowhere if it is empty."""


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
    """The file is complete and named: an export, or the snapshot that a Commit asked for.

    `path` is empty where a snapshot could not be written; the one before it stays.
    """

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


@dataclass(frozen=True)
class Coded:
    """What the child's coding came to since its last report."""

    job: JobId
    codings: tuple[Coding, ...]


@dataclass(frozen=True)
class LivenessCheck:
    """The daemon asks whether the child goes on; it is answered in its turn."""


@dataclass(frozen=True)
class Alive:
    """The answer: all that the child was told before is done, or waits for others."""


EngineMessage = (
    Warm | Configure | Configured | Export | Exported | Busy | Coded | LivenessCheck | Alive
)
