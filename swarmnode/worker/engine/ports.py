"""What the transaction of a step needs of the computing: small protocols, without torch.

The worker child fulfils them with real models; anything that follows the same rules will do.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from swarmnode.domain import BlobRef, Generation, JobId, SlotId
from swarmnode.engine_messages import EngineMessage
from swarmnode.fields import Losses
from swarmnode.messages import (
    Frame,
    Message,
)
from swarmnode.worker.training.expected import Refusal

Payload = bytes | bytearray | memoryview
Send = Callable[[Message | EngineMessage, Payload], None]
"""Gives a message to the daemon."""
Post = Callable[[Frame, Payload], None]
"""Sends a frame to the slot that it is addressed to, wherever that is hosted."""


class Expected(Protocol):
    """The rule for what may come in."""

    def refusal(self, frame: Frame, num_payload_bytes: int) -> Refusal | None:
        """Why the frame cannot be one of this generation, or None if it can."""


class Grid(Protocol):
    """One generation of one job on one node, as its steps see it."""

    @property
    def job(self) -> JobId: ...
    @property
    def generation(self) -> Generation: ...
    @property
    def hosted(self) -> tuple[SlotId, ...]:
        """The slots that compute here."""

    @property
    def held(self) -> tuple[SlotId, ...]:
        """Those and the shadows."""

    @property
    def stages(self) -> Iterable[int]:
        """The stages whose state is here."""

    @property
    def expected(self) -> Expected: ...
    @property
    def reads_data(self) -> bool: ...
    def is_last(self, slot: SlotId) -> bool: ...
    def is_hosted(self, slot: SlotId) -> bool:
        """Whether frames for this slot, or shadow, are for this node."""


class StepPipeline(Protocol):
    """The microbatches of one step, or of one evaluation, on one node."""

    def take(self, frame: Frame, payload: Payload) -> None: ...
    def work(self) -> SlotId | None:
        """Do one unit; the slot that did it, or None if all wait or are done."""

    def is_finished(self, slot: SlotId) -> bool: ...
    def microbatches(self, slot: SlotId) -> tuple[int, ...]: ...
    def losses(self, slot: SlotId) -> tuple[float, ...]: ...


class StepReduction(Protocol):
    """From the slots' gradients of one step to the states after it."""

    def share(self, slot: SlotId, losses: Losses) -> None:
        """Send a finished slot's share of every shard, and its losses, to the owners."""

    def take(self, frame: Frame, payload: Payload) -> None: ...
    def is_complete(self, stage: int) -> bool:
        """Whether all reduced shards of a stage are here."""

    def log(self, stage: int) -> BlobRef:
        """Put the complete update of a stage into its log; its name. Raises: DataError."""

    def losses(self, stage: int) -> Losses:
        """Of all microbatches, slot by slot; empty except at the last stage."""

    def sums_of_squares(self, stage: int) -> tuple[tuple[int, float], ...]: ...
    def apply(self, scale: float) -> None:
        """Update every stage that is held."""

    def state_hash(self, stage: int) -> str: ...


class Log(Protocol):
    """Where the update of one stage in one step goes before it is said to be ready."""

    def write(self, step: int, payloads: Sequence[Payload]) -> BlobRef:
        """Store it; the name of its index. Raises: DataError."""


MakePipeline = Callable[[int, bool, Post], StepPipeline]
"""(step, whether it is an evaluation, post)."""
MakeReduction = Callable[[int, Post], StepReduction]
