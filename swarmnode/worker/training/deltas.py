"""AQ-SGD at a node's boundaries: hidden states as changes since their sample was last here.

Letters: B rows, S positions, D hidden width.

Each slot has a cache for what it sends to the stage after it and one for what it gets from the
stage before it, also where both ends are on this node. A frame of the engine is one frame of
`delta` for each row. Caches live for one generation; what the step at hand puts into them lasts
once the step is committed, which both ends hear before either begins the next.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from swarmnode.codec_specs import CodecSpec
from swarmnode.compression.codec import Payload, codec_of, get_codec
from swarmnode.compression.delta import DeltaReceiver, DeltaSender
from swarmnode.compression.delta_cache import DeltaCache
from swarmnode.compression.delta_frames import IS_DELTA_AT, PREFIX_BYTES
from swarmnode.compression.payload import header_bytes
from swarmnode.domain import Plan, SlotId
from swarmnode.errors import CodecError, HistoryError

_IN_FULL = "bf16"


class DeltaSizes:
    """How long a microbatch of hidden states may be: each row in full, or as a change."""

    def __init__(self, form: CodecSpec, hidden_shape: tuple[int, int, int]) -> None:
        self.num_rows, *row = hidden_shape
        self.row_shape = tuple(row)
        bf16, codec = get_codec(_IN_FULL), codec_of(form)
        self.full_bytes, self.change_bytes = (
            PREFIX_BYTES + header_bytes(each, self.row_shape) + each.wire_bytes(self.row_shape)
            for each in (bf16, codec)
        )

    def fits(self, num_bytes: int) -> bool:
        return any(
            num_bytes == full * self.full_bytes + (self.num_rows - full) * self.change_bytes
            for full in range(self.num_rows + 1)
        )

    def split(self, payload: Payload) -> list[memoryview]:
        """One frame for each row. Raises: CodecError if they are not what there must be."""
        left, frames = memoryview(payload).cast("B"), []
        for _ in range(self.num_rows):
            if len(left) <= IS_DELTA_AT:
                raise CodecError("hidden states end before their last row")
            size = self.change_bytes if left[IS_DELTA_AT] else self.full_bytes
            frames.append(left[:size])
            left = left[size:]
        if len(left):
            raise CodecError(f"{len(left)} bytes after the last row of hidden states")
        return frames


class Deltas:
    """Both ends of every boundary that a node has a part in, for one generation."""

    def __init__(
        self,
        form: CodecSpec,
        sizes: DeltaSizes,
        plan: Plan,
        hosted: Iterable[SlotId],
        keys_of: Callable[[int, int], Sequence[bytes]],
        budget_bytes: int,
        folder: Path | None = None,
    ) -> None:
        """`keys_of` names the samples of a (step, microbatch), row by row; `budget_bytes` is for
        each end of each boundary, in memory or in nameless files in `folder`.

        Raises: CapacityError if there is no such room."""
        self._sizes = sizes
        self._change = str(form)
        self._keys_of = keys_of
        slot_values = torch.Size(sizes.row_shape).numel()
        self._senders: dict[SlotId, DeltaSender] = {}
        self._receivers: dict[SlotId, DeltaReceiver] = {}
        for slot in sorted(hosted):
            if slot.stage < plan.num_stages - 1:
                cache = DeltaCache(budget_bytes, slot_values, folder)
                self._senders[slot] = DeltaSender(str(form), _scope(plan, slot.stage, slot), cache)
            if slot.stage > 0:
                scope = _scope(plan, slot.stage - 1, slot)
                cache = DeltaCache(budget_bytes, slot_values, folder)
                self._receivers[slot] = DeltaReceiver(str(form), scope, cache)

    def encode(
        self, source: SlotId, step: int, microbatch: int, hidden_BSD: Tensor
    ) -> list[bytearray]:
        """The frames of what `source` sends on, row by row."""
        sender, keys = self._senders[source], self._keys_of(step, microbatch)
        return [sender.prepare(key, row_SD) for key, row_SD in zip(keys, hidden_BSD, strict=True)]

    def prefetch(self, source: SlotId, step: int, microbatch: int) -> None:
        """`source` encodes this microbatch soon: have its caches on disk read beside other work."""
        for key in self._keys_of(step, microbatch):
            self._senders[source].prefetch(key)

    def arrived(self, target: SlotId, payload: Payload) -> None:
        """`target` decodes this soon: as `prefetch`. What is wrong with it, `decode` will say."""
        with contextlib.suppress(CodecError):
            for frame in self._sizes.split(payload):
                self._receivers[target].prefetch(frame)

    def codec(self, frame: Payload) -> str:
        """What a row is coded with: as a change, or in full."""
        return self._change if memoryview(frame)[IS_DELTA_AT] else _IN_FULL

    def codecs(self, payload: Payload) -> list[str]:
        """Of each row. Raises: CodecError if they are not what there must be."""
        return [self.codec(frame) for frame in self._sizes.split(payload)]

    def decode(self, target: SlotId, payload: Payload, device: torch.device | str) -> Tensor:
        """The hidden states (B, S, D) that `target` computes on, float32.

        Raises: HistoryError if a frame does not follow from what is held here. The generation then
        ends, and the next one begins without any history: rarer than a refusal is worth.
        CodecError for bytes that no history of ours makes right.
        """
        receiver, rows = self._receivers[target], []
        for frame in self._sizes.split(payload):
            found = receiver.receive(frame, device)
            what = f"hidden states for stage {target.stage}, slot {target.slot}"
            if found.tensor is None or found.is_repeated:
                raise HistoryError(
                    f"{what} do not follow from those that are held of the same sample"
                )
            if found.tensor.shape != self._sizes.row_shape:
                raise CodecError(f"{what} have rows of another shape")
            rows.append(found.tensor)
        return torch.stack(rows)

    def error(
        self, source: SlotId, step: int, microbatch: int, row: int, hidden_SD: Tensor
    ) -> Tensor | None:
        """What the receiver of `encode` lacks of a row; None where that was not kept."""
        held = self._senders[source].held(self._keys_of(step, microbatch)[row])
        return None if held is None else hidden_SD - held.to(hidden_SD.device).float()

    def commit(self) -> None:
        """The step is committed: what it put into the caches lasts."""
        for end in (*self._senders.values(), *self._receivers.values()):
            end.commit()


def _scope(plan: Plan, cut: int, slot: SlotId) -> bytes:
    return f"generation {plan.generation}, cut {cut}, slot {slot.slot}".encode()
