"""Codecs of single values: as they are, as bfloat16. Their error bounds hold value by value."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from swarmnode.compression.tensors import (
    Payload,
    SpecCodec,
    checked,
    flat,
    from_bytes,
    item_bytes,
    to_bytes,
)


@dataclass(frozen=True)
class RawCodec(SpecCodec):
    """The bytes of the tensor as they are, native (little endian) order. Bit-equal."""

    def encode(self, tensor: Tensor) -> bytearray:
        return to_bytes(flat(tensor).view(torch.uint8))

    def decode(
        self,
        payload: Payload,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        data = checked(payload, self.wire_bytes(shape, dtype))
        return from_bytes(data, dtype).reshape(tuple(shape)).to(device)

    def decode_into(self, payload: Payload, out: Tensor) -> None:
        if out.device.type == "cpu":
            data = checked(payload, self.wire_bytes(out.shape, out.dtype))
            np.copyto(out.view(-1).view(torch.uint8).numpy(), data)
        else:
            super().decode_into(payload, out)

    def error_bound(self, absmax: float, dtype: torch.dtype = torch.float32) -> float:
        """Zero: the tensor's own dtype is the one to decode to."""
        del absmax, dtype
        return 0.0

    @property
    def energy_bound(self) -> float:
        return 0.0


@dataclass(frozen=True)
class Bfloat16Codec(SpecCodec):
    """Every value rounded to the nearest bfloat16, ties to even.

    Values that are not finite pass through. Like every IEEE rounding, it turns what lies half
    a step beyond the largest bfloat16 (3.39e38) into infinity.
    """

    def encode(self, tensor: Tensor) -> bytearray:
        return to_bytes(flat(tensor).to(torch.bfloat16).view(torch.uint8))

    def decode(
        self,
        payload: Payload,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        data = checked(payload, self.wire_bytes(shape, dtype))
        return from_bytes(data, torch.bfloat16).reshape(tuple(shape)).to(device).to(dtype)

    def decode_into(self, payload: Payload, out: Tensor) -> None:
        data = checked(payload, self.wire_bytes(out.shape, out.dtype))
        out.view(-1).copy_(from_bytes(data, torch.bfloat16))

    def error_bound(self, absmax: float, dtype: torch.dtype = torch.float32) -> float:
        """Half a step of 8 significant bits, half a subnormal at least; inf above 3.38e38."""
        item_bytes(dtype)
        return math.inf if absmax > 3.38e38 else absmax * 2.0**-8 + 2.0**-134

    @property
    def energy_bound(self) -> float:
        """Of values above bfloat16's subnormals and below 3.38e38."""
        return 2.0**-16
