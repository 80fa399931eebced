"""Codecs that send some of the values: every P-th of them, or the largest. The rest decode to 0.

The values that are sent form a vector of their own, for a codec of single values or blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from swarmnode.codec_specs import CodecSpec, TopChunk, TopShare
from swarmnode.compression.bitpack import ones, pack_fields, unpack_fields
from swarmnode.compression.protocol import Codec
from swarmnode.compression.tensors import (
    Payload,
    SpecCodec,
    checked,
    flat,
    from_bytes,
    num_elements,
    piece_values,
    to_bytes,
)
from swarmnode.errors import CodecError, NotFiniteError


@dataclass(frozen=True)
class StrideCodec(SpecCodec):
    """Every P-th value of the flattened tensor, from `phase` mod P on; no positions travel.

    ceil(N / P) values at every phase: one past the end is sent as 0. Both ends must use the same
    phase, a step counter; over P phases each value is sent once.
    """

    form: CodecSpec
    inner: Codec
    phase: int = 0

    def at(self, phase: int) -> Self:
        return replace(self, phase=phase % self.form.period)

    def encode(self, tensor: Tensor) -> bytearray:
        x_N = flat(tensor)
        chosen_M = x_N.new_zeros(-(-x_N.numel() // self.form.period))
        sent = x_N[self.phase :: self.form.period]
        chosen_M[: sent.numel()] = sent
        return self.inner.encode(chosen_M)

    def decode(
        self,
        payload: Payload,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        checked(payload, self.wire_bytes(shape, dtype))
        num_values = num_elements(shape)
        chosen_M = self.inner.decode(payload, (-(-num_values // self.form.period),), dtype, device)
        out_N = torch.zeros(num_values, dtype=dtype, device=device)
        target = out_N[self.phase :: self.form.period]
        target.copy_(chosen_M[: target.numel()])
        return out_N.view(tuple(shape))

    def error_bound(self, absmax: float, dtype: torch.dtype = torch.float32) -> float:
        """The largest magnitude of the tensor: that of a value that is not sent."""
        return max(absmax, self.inner.error_bound(absmax, dtype))

    @property
    def energy_bound(self) -> float:
        """1: all that there is may lie beside this phase."""
        return 1.0


@dataclass(frozen=True)
class TopCodec(SpecCodec):
    """The values of largest magnitude, of equal ones the first, in the order of their positions.

    Of every chunk of C values the K largest, with positions in the chunk as packed integers
    (`TopChunk`); or the largest share of all, with a bitmap (`TopShare`).

    Wire:   the positions, then the values as `values` codes them.
    Raises: CodecError at encode if a value is not finite; at decode unless positions are in
            order, inside of the tensor, and as many as there must be.
    """

    form: CodecSpec
    values: Codec

    @property
    def _top(self) -> TopChunk | TopShare:
        assert self.form.top is not None
        return self.form.top

    def encode(self, tensor: Tensor) -> bytearray:
        x_N = flat(tensor)
        num_values, top = x_N.numel(), self._top
        if not num_values:
            return bytearray()
        if isinstance(top, TopChunk):
            positions_K = _top_of_chunks(x_N, top)
            fields, bits = (positions_K % top.chunk).to(torch.int32), top.index_bits
        else:
            mask_N = _largest(_magnitudes(x_N), top.num_kept(num_values))
            positions_K = mask_N.nonzero().flatten()
            fields, bits = mask_N.to(torch.uint8), 1
        index = torch.empty(top.index_bytes(num_values), dtype=torch.uint8, device=x_N.device)
        pack_fields(fields, bits, index)
        return to_bytes(index) + self.values.encode(x_N[positions_K])

    def decode(
        self,
        payload: Payload,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        data = checked(payload, self.wire_bytes(shape, dtype))
        num_values, top = num_elements(shape), self._top
        num_kept, num_index_bytes = top.num_kept(num_values), top.index_bytes(num_values)
        index = from_bytes(data[:num_index_bytes])
        if isinstance(top, TopChunk):
            positions_K = _positions_in_chunks(index, num_values, top)
        else:
            if ones(index) != num_kept:
                raise CodecError(f"{self.spec} payload marks {ones(index)} values, not {num_kept}")
            mask_N = torch.empty(num_values, dtype=torch.uint8)
            unpack_fields(index, 1, mask_N)
            positions_K = torch.from_numpy(np.flatnonzero(mask_N.numpy()))
        chosen_K = self.values.decode(
            memoryview(payload).cast("B")[num_index_bytes:], (num_kept,), dtype, device
        )
        out_N = torch.zeros(num_values, dtype=dtype, device=device)
        out_N[positions_K.to(out_N.device)] = chosen_K
        return out_N.view(tuple(shape))

    def error_bound(self, absmax: float, dtype: torch.dtype = torch.float32) -> float:
        """The largest magnitude of the tensor: more than that of any value that is not sent."""
        return max(absmax, self.values.error_bound(absmax, dtype))

    @property
    def energy_bound(self) -> float:
        """Of the whole energy at least the kept share is sent."""
        top = self._top
        share = top.count / top.chunk if isinstance(top, TopChunk) else float(top.share)
        return 1 - share * (1 - self.values.energy_bound)


def _magnitudes(x_M: Tensor) -> Tensor:
    """|x| as float32. Raises: NotFiniteError if one is not finite."""
    magnitude_M = x_M.float().abs()
    if not bool(magnitude_M.amax().isfinite()):
        raise NotFiniteError("cannot choose the largest values: one is not finite")
    return magnitude_M


def _top_of_chunks(x_N: Tensor, top: TopChunk) -> Tensor:
    """Positions in the tensor, in order, of the largest values of every chunk."""
    num_values = x_N.numel()
    rows = max(1, piece_values(x_N.device, num_values) // top.chunk)
    whole = num_values // top.chunk * top.chunk
    found = []
    for start in range(0, whole, rows * top.chunk):
        stop = min(start + rows * top.chunk, whole)
        magnitude_RC = _magnitudes(x_N[start:stop]).view(-1, top.chunk)
        found.append(_largest_of_rows(magnitude_RC, top.count) + start)
    if whole < num_values:
        magnitude_1M = _magnitudes(x_N[whole:]).unsqueeze(0)
        count = top.num_kept(num_values - whole)
        found.append(_largest_of_rows(magnitude_1M, count) + whole)
    return torch.cat(found)


def _largest_of_rows(magnitude_RC: Tensor, count: int) -> Tensor:
    """Flat positions of exactly `count` values in every row: the largest, then the first."""
    least_R1 = magnitude_RC.topk(count, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    mask_RC = magnitude_RC >= least_R1
    found = _nonzero(mask_RC)
    if found.numel() == count * magnitude_RC.shape[0]:
        return found
    rows = (mask_RC.sum(dim=1) > count).nonzero().flatten()
    above_RC = magnitude_RC[rows] > least_R1[rows]
    equal_RC = magnitude_RC[rows] == least_R1[rows]
    wanted_R1 = count - above_RC.sum(dim=1, keepdim=True)
    mask_RC[rows] = above_RC | (equal_RC & (equal_RC.cumsum(dim=1) <= wanted_R1))
    return _nonzero(mask_RC)


def _largest(magnitude_N: Tensor, count: int) -> Tensor:
    """A mask of exactly the `count` largest values, of equal ones the first.

    By counting the upper, then the lower half of the floats' bits, which are in their order:
    linear in N, and the same on every device.
    """
    bits_N = magnitude_N.view(torch.int32)
    upper_N = bits_N >> 16
    upper, above = _bin_of(torch.bincount(upper_N, minlength=1 << 15), count)
    lower = (bits_N[upper_N == upper] & 0xFFFF).long()
    least, above_too = _bin_of(torch.bincount(lower, minlength=1 << 16), count - above)
    least += upper << 16
    mask_N = bits_N > least
    mask_N[(bits_N == least).nonzero().flatten()[: count - above - above_too]] = True
    return mask_N


def _bin_of(histogram: Tensor, count: int) -> tuple[int, int]:
    """(the bin that holds the `count`-th from above, how many values lie in bins above it)."""
    from_above = histogram.flip(0).cumsum(0)
    place = int((from_above < count).sum())
    above = int(from_above[place - 1]) if place else 0
    return histogram.numel() - 1 - place, above


def _nonzero(mask_RC: Tensor) -> Tensor:
    """Flat positions of what is set, in order."""
    if mask_RC.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask_RC.numpy()))
    return mask_RC.view(-1).nonzero().flatten()


def _positions_in_chunks(index: Tensor, num_values: int, top: TopChunk) -> Tensor:
    """Positions in the tensor. Raises: CodecError unless they are in order and inside."""
    num_kept = top.num_kept(num_values)
    whole, rest = divmod(num_values, top.chunk)
    fields_K = torch.empty(num_kept, dtype=torch.int32)
    unpack_fields(index, top.index_bits, fields_K)
    split = whole * top.count
    fields_RK, last_K = fields_K[:split].view(whole, top.count), fields_K[split:]
    if (
        bool((fields_RK >= top.chunk).any())
        or bool((last_K >= rest).any())
        or bool((fields_RK[:, 1:] <= fields_RK[:, :-1]).any())
        or bool((last_K[1:] <= last_K[:-1]).any())
    ):
        raise CodecError("payload has positions out of order or outside of the tensor")
    positions_K = fields_K.long()
    positions_K[:split].view(whole, top.count).add_(
        torch.arange(whole).mul_(top.chunk).unsqueeze(1)
    )
    positions_K[split:].add_(whole * top.chunk)
    return positions_K
