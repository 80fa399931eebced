"""What is owed, step by step, where the memory for it runs out."""

import pytest
import torch
from torch import Tensor

from swarmnode.compression.codec import Codec, Payload, get_codec
from swarmnode.domain import SlotId
from swarmnode.worker.training.residuals import Residuals, Sent

NUM_PARTS = 3


class ShortOfMemory:
    """A codec on a device that is full when it decodes for the second time."""

    def __init__(self) -> None:
        self._codec: Codec = get_codec("int8")
        self.num_decoded = 0

    def encode(self, tensor: Tensor) -> Payload:
        return self._codec.encode(tensor)

    def decode(self, payload: Payload, shape: torch.Size, *, device: torch.device) -> Tensor:
        self.num_decoded += 1
        if self.num_decoded == 2:
            raise torch.OutOfMemoryError("no memory is left")
        return self._codec.decode(payload, shape, device=device)


def test_who_runs_out_of_memory_at_a_commit_can_go_on_and_owes_nothing_twice() -> None:
    residuals, codec = Residuals(), ShortOfMemory()
    shares = [Sent("share", SlotId(0, 0), 0, part) for part in range(NUM_PARTS)]
    residuals.begin("layout", 0, lambda _: None)
    for share in shares:
        residuals.encode(share, torch.randn(5000), codec, 0)  # type: ignore[arg-type]
    with pytest.raises(torch.OutOfMemoryError):
        residuals.committed(0)
    residuals.begin("layout", 1, lambda _: None)
    assert residuals.num_held <= 1, "of those that were not ended nobody knows what they owe"
    for share in shares:
        residuals.encode(share, torch.randn(5000), codec, 1)  # type: ignore[arg-type]
    residuals.committed(1)
    assert residuals.num_held == NUM_PARTS
