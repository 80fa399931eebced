"""What coding has lost of the gradients that a node sends, and still owes: error feedback.

Every slot has a residual for its share of each shard, and the owner of a shard one for its sum.
They live with the process that computes: whoever takes a slot over begins without one. A residual
belongs behind exactly one committed step; elsewhere it is dropped and counted, never applied.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

from swarmnode.compression.codec import Codec, Payload
from swarmnode.compression.feedback import ErrorFeedback, Pending
from swarmnode.domain import BlobRef, SlotId


class Sent(NamedTuple):
    """A tensor that a slot sends in every step."""

    kind: Literal["share", "sum"]
    slot: SlotId
    """Whose share it is, or who owns the shard."""
    group: int
    part: int


class _Open(NamedTuple):
    """What was sent in the step at hand, until it is known whether the step was committed."""

    pending: Pending
    payload: Payload
    codec: Codec


class Residuals:
    """The residuals of one node, from generation to generation.

    encode ...; committed() when the step's Commit is applied. A generation may end before; begin()
    then says where the next one goes on: at the same step, or at the one after it, where the step
    was committed without this node's hearing of it.
    """

    def __init__(self) -> None:
        self._layout: object = None
        self._by_tensor: dict[Sent, ErrorFeedback] = {}
        self._open: dict[Sent, _Open] = {}
        self._step = -1
        """The step of what is open."""
        self._logged: dict[int, BlobRef] = {}
        """By stage: the update of that step, as it was logged here."""
        self._num_dropped = 0
        self._decay = 1.0

    @property
    def num_dropped(self) -> int:
        """Residuals that were of no use: of another time or layout, or not finite."""
        return self._num_dropped + sum(each.num_dropped for each in self._by_tensor.values())

    @property
    def num_held(self) -> int:
        return sum(each.residual is not None for each in self._by_tensor.values())

    def encode(self, key: Sent, tensor: Tensor, codec: Codec, step: int) -> Payload:
        """The bytes of `tensor` and of what is owed. Raises: CodecError if they cannot be coded."""
        assert step == self._step or not self._open, "one step at a time"
        self._step = step
        decay = self._decay if key.kind == "share" else 1.0
        feedback = self._by_tensor.setdefault(key, ErrorFeedback(decay=decay, max_absence=1))
        pending = feedback.prepare(tensor, step)
        try:
            payload = codec.encode(pending.tensor)
        except BaseException:
            feedback.rollback(pending)
            raise
        self._open[key] = _Open(pending, payload, codec)
        return payload

    def lost(self, key: Sent) -> Tensor:
        """What the bytes of `key` lack in the step at hand: what will be owed."""
        pending, payload, codec = self._open[key]
        wanted = pending.tensor
        return wanted - codec.decode(payload, wanted.shape, device=wanted.device)

    def logged(self, stage: int, step: int, update: BlobRef) -> None:
        """The whole update of a stage is here, made of what was sent in `step`."""
        if step == self._step:
            self._logged[stage] = update

    def committed(self, step: int) -> None:
        """`step` was committed: what it lost is owed from now on, and nothing else."""
        self._end(lambda _: True)
        self._drop_all_but(step)

    def begin(
        self,
        layout: object,
        step: int,
        update_of: Callable[[int], BlobRef | None],
        *,
        decay: float = 1.0,
    ) -> None:
        """A generation begins with `step`; only a residual of the step before it is of use.

        `layout` is equal where shards mean the same values. `update_of` names a stage's committed
        update of the step before: where it is the one that was logged here, the step that was
        interrupted is the one that was committed. What a share owes shrinks by `decay` each step.
        """
        self._decay = decay
        if layout != self._layout:
            self._drop(set(self._by_tensor))
            self._layout = layout
        confirmed = {
            stage
            for stage, logged in self._logged.items()
            if self._open and self._step == step - 1 and update_of(stage) == logged
        }
        self._end(lambda key: key.slot.stage in confirmed)
        self._drop_all_but(step - 1)

    def _end(self, is_committed: Callable[[Sent], bool]) -> None:
        while self._open:  # what cannot be decoded now, for want of memory, is behind no step
            key, (pending, payload, codec) = self._open.popitem()
            feedback = self._by_tensor[key]
            is_owed = False
            try:
                if is_committed(key):
                    sent = codec.decode(payload, pending.tensor.shape, device=pending.tensor.device)
                    feedback.commit(pending, sent)
                    is_owed = True
            finally:
                if not is_owed:
                    feedback.rollback(pending)
        self._logged.clear()

    def _drop_all_but(self, step: int) -> None:
        self._drop({key for key, each in self._by_tensor.items() if each.step != step})

    def _drop(self, keys: set[Sent]) -> None:
        for key in keys:
            self._open.pop(key, None)
            gone = self._by_tensor.pop(key)
            self._num_dropped += gone.num_dropped + (gone.residual is not None)
