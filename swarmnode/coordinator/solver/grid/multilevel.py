"""Large swarms in two levels: near nodes stick together in blocks, and blocks are arranged first.

A block is `size` nodes that take neighbouring lanes of one stage. The blocks form a grid of their
own, (S, V / size), with tables of their own, so the same annealing arranges them; it moves whole
regions at once, which single exchanges cannot. Unfolded, it is where the fine search starts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swarmnode.coordinator.solver.grid.seeds import tour

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Coarse:
    """The swarm seen as blocks. Shapes: members (B, size); tables (B, B) seconds."""

    members: Ints
    reduce_s: Floats
    hop_s: Floats

    def unfold(self, blocks: Ints) -> Ints:
        """The grid of nodes that a grid of blocks stands for: (S, V / size) -> (S, V)."""
        return self.members[blocks].reshape(len(blocks), -1)


def block_size(slots: int, num_nodes: int, most_blocks: int) -> int:
    """The least divisor of `slots` that makes at most `most_blocks` blocks; `slots` if none."""
    sizes = (size for size in range(1, slots + 1) if slots % size == 0)
    return next((size for size in sizes if num_nodes // size <= most_blocks), slots)


def coarsen(nodes: Ints, reduce_s: Floats, hop_s: Floats, size: int) -> Coarse:
    """Blocks of `size` near nodes. A block's row sum is that of its mean member; hops are means.

    Shapes: nodes (B * size,), the tables (N, N).
    """
    members = _blocks(nodes, hop_s, size)
    flat = members.ravel()
    shape = (len(members), size, len(members), size)
    means_s = reduce_s[np.ix_(flat, flat)].reshape(shape).mean(axis=(1, 3))
    hops_s = hop_s[np.ix_(flat, flat)].reshape(shape).mean(axis=(1, 3))
    return Coarse(members, size * means_s, hops_s)


def _blocks(nodes: Ints, distance: Floats, size: int) -> Ints:
    """Start at a far node, take the nearest others that are left, go on. Shapes: (B, size)."""
    left = [int(node) for node in tour(nodes, distance)]
    blocks = []
    while left:
        first = left.pop(0)
        near = np.argsort(distance[first, left], kind="stable")[: size - 1]
        blocks.append([first, *(left[i] for i in near)])
        chosen = {int(i) for i in near}
        left = [node for i, node in enumerate(left) if i not in chosen]
    return np.array(blocks, dtype=np.int64)
