"""The code `int b`: blocks of values on a grid, with one scale each. 2 to 8 bits.

Shape letters: N values, B blocks of G values, M values of one piece of work, R blocks of it.
On a CPU the work goes tile by tile through buffers that stay in the core's cache.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swarmnode.codec_specs import IntCode
from swarmnode.compression.bitpack import pack_fields, packed_bytes, unpack_fields
from swarmnode.compression.hadamard import rotate, unrotate
from swarmnode.compression.tensors import (
    TILE,
    Payload,
    SpecCodec,
    checked,
    flat,
    from_bytes,
    item_bytes,
    piece_values,
    pieces,
)
from swarmnode.errors import CodecError, NotFiniteError

_TOP_SCALE_BITS = 0x7F7F
"""The largest finite bfloat16; a pattern above it is infinite or not a number."""
_TOP_ROTATED_BITS = 0x7B80
"""Those of 2^120: what comes out of a rotation of that is finite."""
_TOP_ROTATED = 2.0**120
_TINY_SCALE = 2.0**-100
_BOOST = 2.0**100
_UP = 1 + 2.0**-7
"""The most that rounding up to bfloat16 makes a normal number larger."""
_FIXED_POINT = 4096.0
"""Squared errors are compared as multiples of its inverse: sums of integers, in any order equal."""


@dataclass(frozen=True)
class IntCodec(SpecCodec):
    """Blocks of G values, each as one scale s and G codes of b bits; b + 16 / G bits a value.

    Blocks run along the flattened tensor; the last may be shorter. s is the block's largest
    magnitude rounded *up* to bfloat16 (which has float32's range, so 1e-30 and 1e38 survive;
    s <= absmax * (1 + 2^-7)). With L = 2^(b-1) - 1, code = round(x * L / s), to nearest, ties to
    even, so -L .. L; the value decoded is code * (s / L). A block of zeros has s = 0.

    A block may be coded in another way, which the sign of its scale says. It is chosen where it
    has the smaller squared error, by arithmetic in integers: every device chooses alike.
    - 2 bits: four levels -3/4 s, -1/4 s, 1/4 s, 3/4 s instead of three, -s, 0, s. Dense blocks
      take the four; a few large values among zeros keep the three.
    - rotated: the block goes through a Hadamard rotation first (2 bits: and then on four levels),
      s being the largest magnitude after it. A short last block is never rotated.

    Wire:   B scales of 2 bytes (little endian bfloat16), then N fields of b bits (`bitpack`),
            code + 2^(b-1). 8 bits are plain signed bytes.
    Raises: CodecError at encode if a value is not finite; at decode for a scale that is not
            finite or has a sign that means nothing, and for a code below -L.
    """

    @property
    def _code(self) -> IntCode:
        assert isinstance(self.form.code, IntCode)
        return self.form.code

    @property
    def _top(self) -> int:
        """The largest code, L."""
        return (1 << self._code.bits - 1) - 1

    def encode(self, tensor: Tensor) -> bytearray:
        x_N = flat(tensor)
        num_values, bits, device = x_N.numel(), self._code.bits, x_N.device
        num_blocks = -(-num_values // self._code.block)
        wire = bytearray(self.wire_bytes((num_values,), x_N.dtype))
        if not wire:
            return wire
        host = torch.frombuffer(wire, dtype=torch.uint8)
        out = host if device.type == "cpu" else torch.empty_like(host, device=device)
        packed = out[2 * num_blocks :]
        absmax_B, scale_B = torch.empty((2, num_blocks), device=device)
        piece = piece_values(device, num_values)
        buffer_M = torch.empty(min(TILE, piece) if device.type == "cpu" else piece, device=device)
        codes_M = torch.empty(piece if bits < 8 else 0, dtype=torch.int8, device=device)
        for start, stop in pieces(num_values, piece):
            codes = codes_M[: stop - start] if bits < 8 else packed[start:stop].view(torch.int8)
            for blocks, values in self._rows(start, stop):
                width = min(self._code.block, values.stop - values.start)
                codes_BG = codes[values.start - start : values.stop - start].view(-1, width)
                scale_B[blocks] = self._quantize(
                    x_N[values].view(-1, width), absmax_B[blocks], codes_BG, buffer_M
                )
            if bits < 8:
                fields_M = codes.view(torch.uint8).add_(1 << bits - 1)
                part = packed[packed_bytes(start, bits) : packed_bytes(stop, bits)]
                pack_fields(fields_M, bits, part)
        if not math.isfinite(float(absmax_B.amax())):
            shape = tuple(tensor.shape)
            raise NotFiniteError(f"{self.spec} cannot code {shape}: a value is not finite")
        out[: 2 * num_blocks].copy_(scale_B.to(torch.bfloat16).view(torch.uint8))
        if out is not host:
            host.copy_(out)
        return wire

    def _quantize(
        self, x_BG: Tensor, absmax_B: Tensor, codes_BG: Tensor, buffer_M: Tensor
    ) -> Tensor:
        """Fill magnitudes and codes; the scales, negative for blocks coded in the other way.

        Goes twice over the values, by as many blocks as the buffer holds.
        """
        num_rows, width = x_BG.shape
        step = max(1, buffer_M.numel() // width)
        buffer_RG = buffer_M[: step * width].view(-1, width)
        tiles = [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]
        for rows in tiles:
            buffer = buffer_RG[: rows.stop - rows.start]
            if x_BG.dtype == torch.float32:
                torch.abs(x_BG[rows], out=buffer)
            else:
                buffer.copy_(x_BG[rows]).abs_()
            torch.amax(buffer, dim=1, out=absmax_B[rows])
        scale_B = _round_up(absmax_B)
        inverse_B1 = _divide(self._top, scale_B).unsqueeze(1)
        for rows in tiles:
            buffer = buffer_RG[: rows.stop - rows.start]
            torch.mul(x_BG[rows], inverse_B1[rows], out=buffer)
            codes_BG[rows].copy_(buffer.round_())
        if float(scale_B.amin()) < _TINY_SCALE:
            self._code_tiny_blocks(x_BG, scale_B, codes_BG)
        if self._has_alternative(width):
            for rows in tiles:
                self._improve(x_BG[rows].float(), codes_BG[rows], scale_B[rows])
        return scale_B

    def _has_alternative(self, width: int) -> bool:
        is_whole = width == self._code.block
        return is_whole if self.form.is_rotated else self._code.bits == 2

    def _improve(self, x_RG: Tensor, codes_RG: Tensor, scale_R: Tensor) -> None:
        """Code in the other way the blocks whose squared error is then surely smaller."""
        plain_RG = x_RG * _divide(self._top, scale_R).unsqueeze(1)
        plain_error_R = _squares(plain_RG.sub_(codes_RG))
        if self.form.is_rotated:
            x_RG = rotate(x_RG)
        absmax_R = x_RG.abs().amax(dim=1)
        other_R = _round_up(absmax_R)
        levels = 2 if self._code.bits == 2 else self._top
        x_RG = x_RG * _divide(levels, other_R).unsqueeze(1)
        if self._code.bits == 2:
            x_RG.sub_(0.5)
        other_RG = x_RG.round().clamp_(-self._top - (self._code.bits == 2), self._top)
        doubt = x_RG.shape[1] / 2  # all roundings to fixed point, at their worst
        error_R = _squares(x_RG.sub_(other_RG)).add_(doubt)
        # A half or one: devices divide by other numbers in different ways.
        ratio_R = other_R / scale_R.clamp_min(_TINY_SCALE) * (self._top / levels)
        is_better_R = error_R * ratio_R * ratio_R < plain_error_R.sub_(doubt)
        is_better_R &= (scale_R >= _TINY_SCALE) & (other_R >= _TINY_SCALE)
        if self.form.is_rotated:
            is_better_R &= absmax_R <= _TOP_ROTATED
        codes_RG.copy_(torch.where(is_better_R.unsqueeze(1), other_RG.to(torch.int8), codes_RG))
        scale_R.copy_(torch.where(is_better_R, -other_R, scale_R))

    def _code_tiny_blocks(self, x_RG: Tensor, scale_R: Tensor, codes_RG: Tensor) -> None:
        """Code again, exactly, the blocks whose L / scale is near or past float32's range."""
        rows = ((scale_R > 0) & (scale_R < _TINY_SCALE)).nonzero().flatten()
        inverse_R1 = _divide(self._top, scale_R[rows] * _BOOST).unsqueeze(1)
        codes_RG[rows] = (x_RG[rows].float() * _BOOST * inverse_R1).round_().to(torch.int8)

    def decode(
        self,
        payload: Payload,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        checked(payload, self.wire_bytes(shape, dtype))
        out = torch.empty(tuple(shape), dtype=dtype, device=device)
        self.decode_into(payload, out)
        return out

    def decode_into(self, payload: Payload, out: Tensor) -> None:
        data = checked(payload, self.wire_bytes(out.shape, out.dtype))
        out_N, num_values, bits = out.view(-1), out.numel(), self._code.bits
        if not num_values:
            return
        is_other, step, packed = self._scales(data, num_values)
        device = out.device
        step_B1 = step.to(device).unsqueeze(1)  # divided on the host: a GPU would multiply
        other_B = is_other.to(device) if bool(is_other.any()) else None
        piece = piece_values(device, num_values)
        codes_M = torch.empty(piece if bits < 8 else 0, dtype=torch.int8, device=device)
        lowest = torch.zeros((), dtype=torch.int8, device=device)
        for start, stop in pieces(num_values, piece):
            part = packed[packed_bytes(start, bits) : packed_bytes(stop, bits)]
            codes = self._codes(from_bytes(part).to(device), codes_M[: stop - start])
            for blocks, values in self._rows(start, stop):
                width = min(self._code.block, values.stop - values.start)
                codes_RG = codes[values.start - start : values.stop - start].view(-1, width)
                out_RG = out_N[values].view(-1, width)
                if other_B is None:
                    torch.minimum(lowest, codes_RG.amin(), out=lowest)
                    torch.mul(codes_RG, step_B1[blocks], out=out_RG)
                else:
                    other_R = other_B[blocks]
                    out_RG.copy_(self._values(codes_RG, step_B1[blocks], other_R, lowest))
        if int(lowest) < -self._top:
            raise CodecError(f"{self.spec} payload has a code below {-self._top}")

    def _scales(
        self, data: NDArray[np.uint8], num_values: int
    ) -> tuple[Tensor, Tensor, NDArray[np.uint8]]:
        """(which blocks are coded in the other way, their steps, the packed codes)."""
        num_blocks = -(-num_values // self._code.block)
        bits_B, packed = data[: 2 * num_blocks].view("<u2"), data[2 * num_blocks :]
        if bits_B.max() <= _TOP_SCALE_BITS:
            step_B = from_bytes(bits_B.view(np.uint8), torch.bfloat16).float() / self._top
            return torch.zeros(num_blocks, dtype=torch.bool), step_B, packed
        other_B, magnitude_B = bits_B > 0x8000, bits_B & 0x7FFF
        top = _TOP_ROTATED_BITS if self.form.is_rotated else _TOP_SCALE_BITS
        allowed_B = np.full(num_blocks, self._has_alternative(self._code.block))
        if num_values % self._code.block:
            allowed_B[-1] = self._has_alternative(num_values % self._code.block)
        if (
            magnitude_B.max() > _TOP_SCALE_BITS
            or (bits_B == 0x8000).any()
            or (other_B & (~allowed_B | (magnitude_B > top))).any()
        ):
            raise CodecError(f"{self.spec} payload has a scale that is negative or not finite")
        scale_B = from_bytes(magnitude_B.astype("<u2").view(np.uint8), torch.bfloat16).float()
        levels = 2 if self._code.bits == 2 else self._top
        other = torch.from_numpy(other_B)
        return other, torch.where(other, scale_B / levels, scale_B / self._top), packed

    def _codes(self, packed: Tensor, codes_M: Tensor) -> Tensor:
        """Signed codes from their bytes, in `codes_M` unless they are those bytes."""
        if self._code.bits == 8:
            return packed.view(torch.int8)
        unpack_fields(packed, self._code.bits, codes_M.view(torch.uint8))
        codes_M.view(torch.uint8).sub_(1 << self._code.bits - 1)  # modulo 256
        return codes_M

    def _values(
        self, codes_RG: Tensor, steps_R1: Tensor, other_R: Tensor, lowest: Tensor
    ) -> Tensor:
        """Values of blocks of which some are coded in the other way; float32."""
        is_midrise = self._code.bits == 2
        plain_RG = codes_RG.masked_fill(other_R.unsqueeze(1), 0) if is_midrise else codes_RG
        torch.minimum(lowest, plain_RG.amin(), out=lowest)
        values_RG = codes_RG + other_R.unsqueeze(1) * (0.5 if is_midrise else 0.0)
        values_RG.mul_(steps_R1)
        if self.form.is_rotated:
            values_RG[other_R] = unrotate(values_RG[other_R])
        return values_RG

    def _rows(self, start: int, stop: int) -> Iterator[tuple[slice, slice]]:
        """(blocks, values) of a piece: its whole blocks, then the short one if there is one."""
        block = self._code.block
        first, whole = start // block, (stop - start) // block
        split = start + whole * block
        if whole:
            yield slice(first, first + whole), slice(start, split)
        if split < stop:
            yield slice(first + whole, first + whole + 1), slice(split, stop)

    def error_bound(self, absmax: float, dtype: torch.dtype = torch.float32) -> float:
        """Half a step, s / 2L; sqrt(G) times that where a block may be rotated.

        A rotation mixes values, so it bounds one error only by the block's. Another 2^-8 of the
        value for bfloat16; 2^-140 for what float32 cannot scale.
        """
        largest_scale = absmax * _UP + 2.0**-133  # a step of bfloat16 near zero
        bound = largest_scale / (2 * self._top) * (1 + 2.0**-11) + 2.0**-140
        if self.form.is_rotated:
            bound *= math.sqrt(self._code.block) * (1 + 2.0**-10)
        rounding = item_bytes(dtype) == 2
        return bound + ((absmax + bound) * 2.0**-8 + 2.0**-134 if rounding else 0.0)

    @property
    def energy_bound(self) -> float:
        """The least of what half a step, and a level at zero, allow for a block above 2^-100."""
        block, top = self._code.block, self._top
        largest = min(0.25, (top * (_UP - 1)) ** 2)  # of the value that makes the scale, in steps
        by_steps = _UP**2 * ((block - 1) / 4 + largest) / top**2
        by_zero = 1 - (1 - (_UP - 1) ** 2) / block
        return min(by_steps, by_zero) * (1 + 2.0**-14)


def _round_up(absmax_R: Tensor) -> Tensor:
    """Round magnitudes up to bfloat16, at most its largest finite value. float32 in and out.

    Above that largest value a code is at most L and a little, so the bound still holds.
    """
    bits_R = absmax_R.view(torch.int32).add(0xFFFF).bitwise_and_(-0x10000)
    return bits_R.clamp_(max=_TOP_SCALE_BITS << 16).view(torch.float32)


def _divide(top: int, scale_R: Tensor) -> Tensor:
    """`top` / scale, as a division of two tensors: the one form that rounds alike everywhere.

    Finite: blocks below the tiny scale get its quotient, and are coded again where they matter.
    """
    return torch.full_like(scale_R, top).div_(scale_R.clamp_min(_TINY_SCALE))


def _squares(error_RG: Tensor) -> Tensor:
    """Sums of squares by rows, in fixed point: integers under 2^24, exact in any order."""
    return error_RG.mul_(error_RG).mul_(_FIXED_POINT).round_().sum(dim=1)
