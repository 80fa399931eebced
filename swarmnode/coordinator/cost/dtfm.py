"""DT-FM's cost of a grid of stages and pipelines, exactly, so that numbers compare one to one.

An iteration is the slowest stage's gradient exchange (each node to each other of its stage, one
after the other: a sharded parameter server) plus, hop after hop, the slowest pipeline's transfer
of a whole batch there and back. No compute, no memory, no overlap.
Source: Yuan et al., "Decentralized Training of Foundation Models in Heterogeneous Environments",
arXiv:2206.01288, equations 1 to 4; constants of DS3Lab/DT-FM at cda948f.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from swarmnode.coordinator.objective import Price
from swarmnode.coordinator.topology import Matrix, Topology

GRADIENT_BYTES = 0.65e9
"""Per stage: 1.3e9 parameters x 4 bytes x 3 of 24 layers."""
ACTIVATION_BYTES = 2024 * 2048 * 2 * (1.25e5 / 2048) / 2**30 * 1e9
"""Per hop: 1.25e5 tokens (61.035 sequences) of one pipeline; 2024 x 2048 values of 2 bytes each, in
GiB, which DT-FM divides by a bandwidth in 1e9 bytes. Both slips (2024, GiB) are theirs; kept."""

Grid = NDArray[np.int64]


def reduction_table(topology: Topology, slots: int, gradient_bytes: float) -> Matrix:
    """What one node adds to another's row sum if they share a stage: send a share, get a share.

    Shapes: (N, N) seconds; row pays; inf without a link.
    """
    return 2.0 * topology.transfer_s(gradient_bytes / slots)


def hop_table(topology: Topology, activation_bytes: float) -> Matrix:
    """One hop of a pipeline: activations there, their gradients back. Shapes: (N, N), symmetric."""
    there = topology.transfer_s(activation_bytes)
    return there + there.T


def row_sums(grid: Grid, reduce_s: Matrix) -> Matrix:
    """What each slot's node spends in its stage's exchange. Shapes: grid (S, V) -> (S, V)."""
    return np.array([reduce_s[np.ix_(row, row)].sum(axis=1) for row in grid])


def hop_times(grid: Grid, hop_s: Matrix) -> Matrix:
    """What each pipeline spends in each hop. Shapes: grid (S, V) -> (S - 1, V)."""
    return hop_s[grid[:-1], grid[1:]]


def grid_price(grid: Grid, reduce_s: Matrix, hop_s: Matrix) -> Price:
    """The cost of a full grid of distinct nodes: inf if it needs a link that is not there."""
    worst_row_s = float(row_sums(grid, reduce_s).max())
    hops_s = hop_times(grid, hop_s)
    pipeline_s = float(hops_s.max(axis=1).sum()) if hops_s.size else 0.0
    return Price(
        total_s=worst_row_s + pipeline_s,
        parts={"data_parallel_s": worst_row_s, "pipeline_s": pipeline_s},
    )


def as_grid(slots: Sequence[Sequence[int]]) -> Grid:
    """The slots of an arrangement as an array. Shapes: (S, V)."""
    return np.array(slots, dtype=np.int64)
