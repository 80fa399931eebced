"""What a codec is.

A codec turns one tensor into bytes for the wire and back. It is stateless, deterministic (the
same tensor gives the same bytes, on every device unless it says otherwise) and safe to share
between threads.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from swarmnode.compression.tensors import Payload


class Codec(Protocol):
    """Encodes and decodes one tensor; states its exact wire bytes and its error bounds.

    `dtype` is float32 or bfloat16 everywhere: the dtype of the tensor, and of the decoded one.
    """

    @property
    def spec(self) -> str:
        """The name that `get_codec` knows it by."""

    @property
    def energy_bound(self) -> float:
        """Most of a tensor's squared norm that its coding errors can have; < 1: a contraction."""

    def at(self, phase: int) -> "Codec":
        """The codec of step `phase`: another one only where the selection moves.

        Its wire bytes are the same at every phase; both ends must use the same.
        """

    def encode(self, tensor: Tensor) -> bytearray:
        """The bytes of `tensor`, from any device and with any strides.

        Raises: CodecError if the dtype or a value cannot be coded.
        """

    def decode(
        self,
        payload: Payload,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """A new contiguous tensor of `shape` from bytes that may come from a stranger.

        Raises: CodecError for anything that `encode` cannot have written for this shape (and
        dtype); the length is checked before anything is allocated.
        """

    def decode_into(self, payload: Payload, out: Tensor) -> None:
        """Fill contiguous `out` with what `decode` gives for its shape, dtype and device.

        Raises: CodecError as `decode`; what is in `out` then means nothing.
        """

    def wire_bytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        """The exact length of what `encode` returns for such a tensor."""

    def error_bound(self, absmax: float, dtype: torch.dtype = torch.float32) -> float:
        """Most that one decoded value can differ from the tensor's, in absolute terms.

        `absmax` is the largest magnitude among the values that share a scale with it (a block,
        at most the tensor); it is finite. `dtype` is the dtype decoded to.
        """
