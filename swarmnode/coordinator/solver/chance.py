"""Pseudo-random numbers inside of compiled loops: the state is an array that the caller owns."""

import numpy as np
from numpy.typing import NDArray

from swarmnode.coordinator.solver.compiled import compiled

Words = NDArray[np.uint64]


@compiled
def draw(word: Words) -> int:
    """The next pseudo-random integer in [0, 2**31) (xorshift64*, Vigna 2016)."""
    x = word[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    word[0] = x
    return np.int64((x * np.uint64(2685821657736338717)) >> np.uint64(33))  # type: ignore[return-value]


@compiled
def below(word: Words, limit: int) -> int:
    """A pseudo-random integer in [0, limit)."""
    return (draw(word) * limit) >> 31
