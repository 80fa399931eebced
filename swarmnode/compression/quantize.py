"""Codecs that round every value on its own grid: as it is, to bfloat16, to 8 bits by blocks.

Shape letters: N elements, B blocks of G = 128 values, T blocks of one tile, R some of those.
On a CPU the work goes tile by tile through buffers that stay in the core's cache.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swarmnode.errors import CodecError

BLOCK = 128
LEVELS = 127
"""Codes are -127..127: symmetric, so that a sign flip is exact and nothing clips."""
MAX_ELEMENTS = 1 << 40
MAX_DIMENSIONS = 8

_TOP_SCALE_BITS = 0x7F7F
"""The largest finite bfloat16; a pattern above it is infinite, not a number or negative."""
_TILE_BLOCKS = {"cpu": 1024}
_DEVICE_TILE_BLOCKS = 1 << 17
_TINY_SCALE = 2.0**-100
_BOOST = 2.0**100
_WIRE_DTYPES = {torch.float32: 4, torch.bfloat16: 2}


def num_elements(shape: Sequence[int]) -> int:
    """The number of values of an announced shape. Raises: CodecError if it is absurd."""
    if len(shape) > MAX_DIMENSIONS or any(size < 0 for size in shape):
        raise CodecError(f"shape {tuple(shape)!r:.80} is not a tensor's")
    if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise CodecError(f"shape {tuple(shape)!r:.80} is too large")
    return math.prod(shape)


@dataclass(frozen=True)
class RawCodec:
    """The bytes of the tensor as they are, native (little endian) order. Bit-equal."""

    spec: str = "none"

    def encode(self, tensor: Tensor) -> bytearray:
        item_bytes(tensor.dtype)
        return _to_bytes(_flat(tensor).view(torch.uint8))

    def decode(
        self,
        payload: bytes | bytearray | memoryview,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        data = _checked(payload, self.wire_bytes(shape, dtype))
        return _from_bytes(data, dtype).reshape(tuple(shape)).to(device)

    def wire_bytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        return num_elements(shape) * item_bytes(dtype)

    def error_bound(self, absmax: float, dtype: torch.dtype = torch.float32) -> float:
        """Zero: the tensor's own dtype is the one to decode to."""
        del absmax, dtype
        return 0.0


@dataclass(frozen=True)
class Bfloat16Codec:
    """Every value rounded to the nearest bfloat16, ties to even.

    Values that are not finite pass through. Like every IEEE rounding, it turns what lies half
    a step beyond the largest bfloat16 (3.39e38) into infinity.
    """

    spec: str = "bf16"

    def encode(self, tensor: Tensor) -> bytearray:
        item_bytes(tensor.dtype)
        return _to_bytes(_flat(tensor).to(torch.bfloat16).view(torch.uint8))

    def decode(
        self,
        payload: bytes | bytearray | memoryview,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        item_bytes(dtype)
        data = _checked(payload, self.wire_bytes(shape, dtype))
        return _from_bytes(data, torch.bfloat16).reshape(tuple(shape)).to(device).to(dtype)

    def wire_bytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        item_bytes(dtype)
        return num_elements(shape) * 2

    def error_bound(self, absmax: float, dtype: torch.dtype = torch.float32) -> float:
        """Half a step of 8 significant bits, half a subnormal at least; inf above 3.38e38."""
        item_bytes(dtype)
        return math.inf if absmax > 3.38e38 else absmax * 2.0**-8 + 2.0**-134


@dataclass(frozen=True)
class Int8Codec:
    """Blocks of 128 values, each as one scale s and 128 codes -127..127; 8.125 bits a value.

    Blocks run along the flattened tensor; the last may be shorter. s is the block's largest
    magnitude rounded *up* to bfloat16 (which has float32's range, so 1e-30 and 1e38 survive;
    s <= absmax * (1 + 2^-7)); code = round(x * 127 / s), to nearest, ties to even; the value
    decoded is code * (s / 127). There is no epsilon: a block of zeros has s = 0.

    Wire:   B scales of 2 bytes (little endian bfloat16), then N codes of 1 byte.
    Bound:  |x - decoded| <= s / 254 up to float32 rounding, for every finite float32: see
            `error_bound`. Below a bfloat16's subnormals (9e-41) a value may become a zero.
    Raises: CodecError at encode if a value is not finite; at decode for a scale that is not
            finite or is negative, and for the code -128.
    """

    spec: str = "int8"

    def encode(self, tensor: Tensor) -> bytearray:
        item_bytes(tensor.dtype)
        x_N = _flat(tensor)
        num_blocks = -(-x_N.numel() // BLOCK)
        on_cpu = x_N.device.type == "cpu"
        wire = bytearray(2 * num_blocks + x_N.numel())
        if not wire:
            return wire
        host = torch.frombuffer(wire, dtype=torch.uint8)
        out = host if on_cpu else torch.empty_like(host, device=x_N.device)
        absmax_B = torch.empty(num_blocks, device=x_N.device)
        codes_N = out[2 * num_blocks :].view(torch.int8)
        tile_values = _tile_values(x_N.device, x_N.numel())
        exact_N, buffer_N = torch.empty((2, tile_values), device=x_N.device)
        for blocks, values in _tiles(x_N.numel(), x_N.device):
            width = min(BLOCK, values.stop - values.start)
            x_TG = x_N[values].view(-1, width)
            if x_TG.dtype != torch.float32:
                x_TG = exact_N[: x_TG.numel()].view_as(x_TG).copy_(x_TG)
            buffer_TG = buffer_N[: x_TG.numel()].view_as(x_TG)
            torch.abs(x_TG, out=buffer_TG)
            torch.amax(buffer_TG, dim=1, out=absmax_B[blocks])
            inverse_T1 = _inverse(_scale(absmax_B[blocks])).unsqueeze(1)
            inverse_T1.masked_fill_(inverse_T1.isinf(), 0.0)
            torch.mul(x_TG, inverse_T1, out=buffer_TG)
            codes_N[values].view(-1, width).copy_(buffer_TG.round_())
        if not bool(absmax_B.isfinite().all()):
            raise CodecError(f"int8 cannot code {tuple(tensor.shape)}: a value is not finite")
        scale_B = _scale(absmax_B)
        _code_tiny_blocks(x_N, scale_B, codes_N)
        out[: 2 * num_blocks].copy_(scale_B.to(torch.bfloat16).view(torch.uint8))
        if not on_cpu:
            host.copy_(out)
        return wire

    def decode(
        self,
        payload: bytes | bytearray | memoryview,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        data = _checked(payload, self.wire_bytes(shape, dtype))
        num_values = num_elements(shape)
        if not num_values:
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        num_blocks = -(-num_values // BLOCK)
        bits_B = data[: 2 * num_blocks].view("<u2")
        codes_N = data[2 * num_blocks :].view(np.int8)
        if bits_B.max() > _TOP_SCALE_BITS:
            raise CodecError("int8 payload has a scale that is negative or not finite")
        if codes_N.min() < -LEVELS:
            raise CodecError("int8 payload has the code -128")
        step_B = _from_bytes(bits_B.view(np.uint8), torch.bfloat16).float() / LEVELS
        step_B = step_B.to(device)  # divided on the host: a GPU would multiply by 1 / 127
        out_N = torch.empty(num_values, dtype=dtype, device=device)
        buffer_N = torch.empty(_tile_values(out_N.device, num_values), device=device)
        for blocks, values in _tiles(num_values, out_N.device):
            width = min(BLOCK, values.stop - values.start)
            codes_TG = torch.from_numpy(codes_N[values].copy()).view(-1, width).to(device)
            out_TG = out_N[values].view(-1, width)
            if dtype != torch.float32:
                exact_TG = buffer_N[: codes_TG.numel()].view_as(codes_TG)
                out_TG.copy_(torch.mul(codes_TG, step_B[blocks].unsqueeze(1), out=exact_TG))
            else:
                torch.mul(codes_TG, step_B[blocks].unsqueeze(1), out=out_TG)
        return out_N.view(tuple(shape))

    def wire_bytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        item_bytes(dtype)
        num_values = num_elements(shape)
        return 2 * -(-num_values // BLOCK) + num_values

    def error_bound(self, absmax: float, dtype: torch.dtype = torch.float32) -> float:
        """Half a step: `absmax` / 251.9 + 2^-140; another 2^-8 of the value for bfloat16."""
        bound = absmax * (1 + 2.0**-7) / 253.9 + 2.0**-140
        rounding = item_bytes(dtype) == 2
        return bound + ((absmax + bound) * 2.0**-8 + 2.0**-134 if rounding else 0.0)


def _scale(absmax_B: Tensor) -> Tensor:
    """Round magnitudes up to bfloat16, at most its largest finite value. float32 in and out.

    Above that largest value a code is at most round(127.498) = 127, so the bound still holds.
    """
    bits_B = absmax_B.view(torch.int32).add(0xFFFF).bitwise_right_shift_(16)
    return bits_B.clamp_(max=_TOP_SCALE_BITS).bitwise_left_shift_(16).view(torch.float32)


def _inverse(scale_B: Tensor) -> Tensor:
    """127 / scale, as a division of two tensors: the one form that rounds alike everywhere."""
    return torch.full_like(scale_B, LEVELS).div_(scale_B)


def _code_tiny_blocks(x_N: Tensor, scale_B: Tensor, codes_N: Tensor) -> None:
    """Code again, exactly, the blocks whose 127 / scale is near or past float32's range."""
    tiny_B = (scale_B > 0) & (scale_B < _TINY_SCALE)
    if not bool(tiny_B.any()):
        return
    for blocks, values in _tiles(x_N.numel(), x_N.device):
        width = min(BLOCK, values.stop - values.start)
        rows_R = tiny_B[blocks].nonzero().flatten()
        inverse_R1 = _inverse(scale_B[blocks][rows_R] * _BOOST).unsqueeze(1)
        x_RG = x_N[values].view(-1, width)[rows_R].float()
        codes_RG = (x_RG * _BOOST * inverse_R1).round_().to(torch.int8)
        codes_N[values].view(-1, width)[rows_R] = codes_RG


def _tile_values(device: torch.device, num_values: int) -> int:
    """The most values in one tile of `num_values`."""
    return min(num_values, BLOCK * _TILE_BLOCKS.get(device.type, _DEVICE_TILE_BLOCKS))


def _tiles(num_values: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """(blocks, values) of each tile; the last is the short block, if there is one."""
    step = _TILE_BLOCKS.get(device.type, _DEVICE_TILE_BLOCKS)
    num_full = num_values // BLOCK
    for start in range(0, num_full, step):
        stop = min(start + step, num_full)
        yield slice(start, stop), slice(start * BLOCK, stop * BLOCK)
    if num_values % BLOCK:
        yield slice(num_full, num_full + 1), slice(num_full * BLOCK, num_values)


def item_bytes(dtype: torch.dtype) -> int:
    """Bytes of one value. Raises: CodecError unless float32 or bfloat16."""
    if dtype not in _WIRE_DTYPES:
        raise CodecError(f"codecs take float32 and bfloat16, not {dtype}")
    return _WIRE_DTYPES[dtype]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1)


def _to_bytes(data_N: Tensor) -> bytearray:
    """A copy of uint8 `data_N` in host memory."""
    wire = bytearray(data_N.numel())
    if wire:
        torch.frombuffer(wire, dtype=torch.uint8).copy_(data_N)
    return wire


def _checked(payload: bytes | bytearray | memoryview, num_bytes: int) -> NDArray[np.uint8]:
    """A view of `payload`. Raises: CodecError if it does not have exactly `num_bytes`."""
    given = memoryview(payload).nbytes
    if given != num_bytes:
        raise CodecError(f"payload of {given} bytes where {num_bytes} were announced")
    return np.frombuffer(payload, dtype=np.uint8)


def _from_bytes(data: NDArray[np.uint8], dtype: torch.dtype) -> Tensor:
    """A new tensor on the host that holds a copy of `data`, which may be unaligned."""
    out = torch.empty(data.size // item_bytes(dtype), dtype=dtype)
    np.copyto(out.view(torch.uint8).numpy(), data)
    return out
