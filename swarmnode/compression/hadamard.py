"""Rotates blocks so that an outlier is spread over its block: a Hadamard matrix after seeded signs.

y = H D x / sqrt(G): D flips the sign of fixed positions, H is Sylvester's matrix. Both ways go by
butterflies, additions in one order, so that every machine gets the same bits; a matrix product
would not give them.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from swarmnode.compression.tensors import sign_bits

SEED = 0x5EED
"""Of the signs: part of the format, it does not travel."""


def rotate(x_RG: Tensor) -> Tensor:
    """The rotation of every row; G is a power of two. float32, a new tensor; lengths stay."""
    signs_G1 = _signs(x_RG.shape[1], x_RG.device)
    x_GR = torch.mul(x_RG.t(), signs_G1)
    return _butterflies(x_GR).t().contiguous()


def unrotate(y_RG: Tensor) -> Tensor:
    """The rows that `rotate` makes these of, to rounding."""
    signs_G1 = _signs(y_RG.shape[1], y_RG.device)
    y_GR = torch.mul(y_RG.t(), signs_G1.abs())
    return _butterflies(y_GR).mul_(signs_G1.sign()).t().contiguous()


@lru_cache(maxsize=64)
def _signs(block: int, device: torch.device) -> Tensor:
    """+-1 / sqrt(G), as a column: the scale goes first, so that no sum can overflow by it."""
    signs = torch.where(torch.from_numpy(sign_bits(block, SEED)), 1.0, -1.0)
    return (signs * (1 / math.sqrt(block))).unsqueeze(1).to(device)


def _butterflies(x_GR: Tensor) -> Tensor:
    """H x for every column, in `x_GR` or in another buffer: the caller's is lost."""
    x_GR = x_GR.contiguous()
    other_GR = torch.empty_like(x_GR)
    block, num_rows = x_GR.shape
    half = block // 2
    while half:
        x, y = (each.view(block // 2 // half, 2, half, num_rows) for each in (x_GR, other_GR))
        torch.add(x[:, 0], x[:, 1], out=y[:, 0])
        torch.sub(x[:, 0], x[:, 1], out=y[:, 1])
        x_GR, other_GR, half = other_GR, x_GR, half // 2
    return x_GR
