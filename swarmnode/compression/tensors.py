"""What all codecs share: sizes that are checked before anything is allocated, bytes in and out."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swarmnode.codec_specs import CodecSpec
from swarmnode.errors import CodecError

Payload = bytes | bytearray | memoryview

MAX_ELEMENTS = 1 << 40
MAX_DIMENSIONS = 8
TILE = 1 << 16
"""Values that are worked on at once on a CPU (they stay in its cache) and packed together on the
wire, whatever the device."""

_CPU_TILES = 8
_DEVICE_TILES = 256
_WIRE_DTYPES = {torch.float32: 4, torch.bfloat16: 2}


@dataclass(frozen=True)
class SpecCodec(ABC):
    """The part of a codec that its spec decides."""

    form: CodecSpec

    @property
    def spec(self) -> str:
        return str(self.form)

    def at(self, phase: int) -> Self:
        """The same codec: what it sends does not depend on the step."""
        del phase
        return self

    @abstractmethod
    def decode(
        self,
        payload: Payload,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """As `Codec.decode`."""

    def decode_into(self, payload: Payload, out: Tensor) -> None:
        """As `Codec.decode_into`; here by way of a new tensor."""
        out.copy_(self.decode(payload, out.shape, out.dtype, out.device))

    def wire_bytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        num_elements(shape)
        return self.form.wire_bytes(shape, item_bytes(dtype))


def num_elements(shape: Sequence[int]) -> int:
    """The number of values of an announced shape. Raises: CodecError if it is absurd."""
    if len(shape) > MAX_DIMENSIONS or any(size < 0 for size in shape):
        raise CodecError(f"shape {tuple(shape)!r:.80} is not a tensor's")
    if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise CodecError(f"shape {tuple(shape)!r:.80} is too large")
    return math.prod(shape)


def item_bytes(dtype: torch.dtype) -> int:
    """Bytes of one value. Raises: CodecError unless float32 or bfloat16."""
    if dtype not in _WIRE_DTYPES:
        raise CodecError(f"codecs take float32 and bfloat16, not {dtype}")
    return _WIRE_DTYPES[dtype]


def flat(tensor: Tensor) -> Tensor:
    """The values in one row, without a copy where they lie so. Raises: CodecError."""
    item_bytes(tensor.dtype)
    return tensor.detach().contiguous().view(-1)


def piece_values(device: torch.device, num_values: int) -> int:
    """Values in one piece of work: a few tiles on a CPU, many on a device; at most `num_values`."""
    return min(num_values, TILE * (_CPU_TILES if device.type == "cpu" else _DEVICE_TILES))


def pieces(num_values: int, piece: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of `piece` values; the last may be shorter."""
    for start in range(0, num_values, piece):
        yield start, min(start + piece, num_values)


def to_bytes(data_N: Tensor) -> bytearray:
    """A copy of uint8 `data_N` in host memory."""
    wire = bytearray(data_N.numel())
    if wire:
        torch.frombuffer(wire, dtype=torch.uint8).copy_(data_N)
    return wire


def checked(payload: Payload, num_bytes: int) -> NDArray[np.uint8]:
    """A view of `payload`. Raises: CodecError if it does not have exactly `num_bytes`."""
    given = memoryview(payload).nbytes
    if given != num_bytes:
        raise CodecError(f"payload of {given} bytes where {num_bytes} were announced")
    return np.frombuffer(payload, dtype=np.uint8)


def from_bytes(data: NDArray[np.uint8], dtype: torch.dtype = torch.uint8) -> Tensor:
    """A new tensor on the host that holds a copy of `data`, which may be unaligned."""
    out = torch.empty(data.size // dtype.itemsize, dtype=dtype)
    np.copyto(out.view(torch.uint8).numpy(), data)
    return out


def sign_bits(count: int, seed: int) -> NDArray[np.bool_]:
    """`count` bits that follow from their number and the seed alone, the same on every machine.

    Source: SplitMix64 (Steele, Lea and Flood, 2014): integers only.
    """
    with np.errstate(over="ignore"):
        state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state += np.uint64(seed)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((state ^ (state >> np.uint64(31))) & np.uint64(1)).astype(np.bool_)
