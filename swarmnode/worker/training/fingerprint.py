"""Hashes and norms of tensors that are the same on every machine that holds the same bits."""

import hashlib
from collections.abc import Iterable

import numpy as np
from torch import Tensor

_CHUNK_VALUES = 1 << 14
"""In float64 this stays in a core's cache."""


def digest(tensors: Iterable[Tensor]) -> str:
    """The SHA-256 over the tensors' float32 bytes, row-major, one after the other, in hex."""
    running = hashlib.sha256()
    for tensor in tensors:
        running.update(tensor.detach().cpu().contiguous().numpy().reshape(-1).view(np.uint8).data)
    return running.hexdigest()


def sum_of_squares(flat: Tensor) -> float:
    """The sum of squares of a flat float32 tensor, in float64.

    Summed by numpy in chunks of fixed size, not by torch, whose order follows its threads.
    """
    values = flat.detach().cpu().numpy()
    total = 0.0
    for start in range(0, values.size, _CHUNK_VALUES):
        chunk = values[start : start + _CHUNK_VALUES].astype(np.float64)
        np.square(chunk, out=chunk)
        total += float(np.add.reduce(chunk))
    return total
