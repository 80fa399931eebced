"""Fields of 1 to 16 bits, packed without a gap: N fields of b bits take ceil(N b / 8) bytes.

Fields go in tiles of 65536, each on its own. In a tile, all fields but the last (N mod 8) are cut
into planes of 8, 4, 2 and 1 bits, the lowest bits in the widest plane: 4 bits are one plane, 3 are
a plane of 2 and one of 1, 12 are one of 8 and one of 4. A plane of w bits lays the k-th of 8 / w
equal runs of fields at bits w k .. w (k + 1) of its bytes: 4 bits as low half | high half of the
tile, so that packing is a few passes over long rows. The last fields follow bit by bit.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from swarmnode.compression.tensors import TILE
from swarmnode.errors import CodecError

_WIDTHS = (8, 4, 2, 1)


def packed_bytes(num_fields: int, bits: int) -> int:
    return -(-num_fields * bits // 8)


def pack_fields(fields_N: Tensor, bits: int, out: Tensor) -> None:
    """Pack integers 0 .. 2^bits - 1 into uint8 `out`, which has exactly the bytes for them."""
    num_fields = fields_N.numel()
    whole = num_fields // TILE
    if whole:
        split = whole * TILE
        _pack_planes(fields_N[:split].view(whole, TILE), bits, out[: split * bits // 8])
        fields_N, out = fields_N[split:], out[split * bits // 8 :]
    main = fields_N.numel() // 8 * 8
    if main:
        _pack_planes(fields_N[:main].view(1, main), bits, out[: main * bits // 8])
    if fields_N.numel() > main:
        total = sum(int(v) << bits * i for i, v in enumerate(fields_N[main:].tolist()))
        tail = total.to_bytes(out.numel() - main * bits // 8, "little")
        out[main * bits // 8 :].copy_(torch.tensor(list(tail), dtype=torch.uint8))


def unpack_fields(data: Tensor, bits: int, out_N: Tensor) -> None:
    """Fill integer `out_N` (uint8 up to 8 bits, else int32) from what `pack_fields` has written.

    Raises: CodecError if the bits after the last field are not zero.
    """
    whole = out_N.numel() // TILE
    if whole:
        split = whole * TILE
        _unpack_planes(data[: split * bits // 8], bits, out_N[:split].view(whole, TILE))
        out_N, data = out_N[split:], data[split * bits // 8 :]
    main = out_N.numel() // 8 * 8
    if main:
        _unpack_planes(data[: main * bits // 8], bits, out_N[:main].view(1, main))
    rest = out_N.numel() - main
    if rest:
        total = int.from_bytes(bytes(data[main * bits // 8 :].tolist()), "little")
        if total >> rest * bits:
            raise CodecError("packed fields have bits set after the last one")
        last = [total >> bits * i & (1 << bits) - 1 for i in range(rest)]
        out_N[main:].copy_(torch.tensor(last))


def _planes(bits: int) -> Iterator[tuple[int, int]]:
    """(lowest bit, width) of each plane, the widest first."""
    shift, left = 0, bits
    for width in _WIDTHS:
        while left >= width:
            yield shift, width
            shift, left = shift + width, left - width


def _pack_planes(fields_TM: Tensor, bits: int, out: Tensor) -> None:
    """Pack T equal tiles of M fields each, M a multiple of 8; tiles stay apart."""
    num_tiles, size = fields_TM.shape
    out_T = out.view(num_tiles, -1)
    start = 0
    for shift, width in _planes(bits):
        field_TM = fields_TM
        if shift or width < bits:
            field_TM = fields_TM.bitwise_right_shift(shift).bitwise_and_((1 << width) - 1)
        runs_TKR = field_TM.to(torch.uint8).view(num_tiles, 8 // width, -1)
        plane_TR = out_T[:, start : start + size * width // 8]
        if width == 8:
            plane_TR.copy_(runs_TKR[:, 0])
        else:
            torch.add(runs_TKR[:, 0], runs_TKR[:, 1], alpha=1 << width, out=plane_TR)
        for k in range(2, 8 // width):
            plane_TR.add_(runs_TKR[:, k], alpha=1 << width * k)
        start += size * width // 8


def _unpack_planes(data: Tensor, bits: int, out_TM: Tensor) -> None:
    num_tiles, size = out_TM.shape
    data_T = data.view(num_tiles, -1)
    start = 0
    for shift, width in _planes(bits):
        plane_TR = data_T[:, start : start + size * width // 8]
        out_TKR = out_TM.view(num_tiles, 8 // width, -1)
        for k in range(8 // width):
            if shift:  # a later plane: onto what the wider ones have written
                field_TR = plane_TR.bitwise_right_shift(width * k)
                field_TR = field_TR.bitwise_and_((1 << width) - 1).to(out_TM.dtype)
                out_TKR[:, k].add_(field_TR, alpha=1 << shift)
            elif out_TM.dtype == torch.uint8:
                _field(plane_TR, width, k, out_TKR[:, k])
            else:
                out_TKR[:, k].copy_(_field(plane_TR, width, k, torch.empty_like(plane_TR)))
        start += size * width // 8


def _field(plane_TR: Tensor, width: int, k: int, out_TR: Tensor) -> Tensor:
    """The k-th field of every byte of a plane, into uint8 `out_TR`."""
    if width == 8:
        return out_TR.copy_(plane_TR)
    if k == 0:
        return torch.bitwise_and(plane_TR, (1 << width) - 1, out=out_TR)
    torch.bitwise_right_shift(plane_TR, width * k, out=out_TR)
    return out_TR if k == 8 // width - 1 else out_TR.bitwise_and_((1 << width) - 1)


def ones(data: Tensor) -> int:
    """How many bits of uint8 `data` on the host are set."""
    return int(np.bitwise_count(data.numpy()).sum(dtype=np.int64))
