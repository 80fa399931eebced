"""An instance of the grid objective as the searches read it: all tables finite, charges included.

Without compiled code: the first answer after a failure must be there before anything compiles.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from swarmnode.coordinator.solver.grid import polish

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NUM_SAMPLES = 32


@dataclass(frozen=True, eq=False)
class GridProblem:
    """Tables of an instance; every entry finite, so that there is always a way downhill.

    Shapes: reduce_s, hop_s (N, N); charge_s (N, S); pin (N,), -1 where free.
    """

    reduce_s: Floats
    hop_s: Floats
    charge_s: Floats
    pin: Ints
    slots: int
    scale_s: float
    """The mean cost of random grids, without links that are not there."""

    @property
    def stages(self) -> int:
        return int(self.charge_s.shape[1])

    @property
    def num_nodes(self) -> int:
        return len(self.reduce_s)

    def charged(self, charge_s: Floats) -> "GridProblem":
        """The same with charges for hosting. Shapes: (N, S)."""
        return replace(self, charge_s=charge_s)

    def cost(self, grid: Ints) -> float:
        """Price and charges. Shapes: grid (S, V)."""
        return _price(grid, self.reduce_s, self.hop_s) + self.charges_s(grid)

    def charges_s(self, grid: Ints) -> float:
        """What the hosts of `grid` have to fetch."""
        return float(self.charge_s[grid, np.arange(len(grid))[:, None]].sum())

    def polished(self, grid: Ints) -> Ints:
        """The better of `grid` and the same stages in their best order, best paired."""
        other = polish.polish(grid, self.hop_s, self.charge_s, self.pin)
        return other if self.cost(other) < self.cost(grid) else grid


def _price(grid: Ints, reduce_s: Floats, hop_s: Floats) -> float:
    rows_s = max(float(reduce_s[np.ix_(row, row)].sum(axis=1).max()) for row in grid)
    hops_s = hop_s[grid[:-1], grid[1:]]
    return rows_s + float(hops_s.max(axis=1).sum() if hops_s.size else 0.0)


def finite_problem(
    reduce_s: Floats, hop_s: Floats, pin: Ints, stages: int, slots: int
) -> GridProblem:
    """The instance with a price on each missing link above that of any grid without one."""
    tops = [float(table[np.isfinite(table)].max(initial=0.0)) for table in (reduce_s, hop_s)]
    mild = [
        np.where(np.isfinite(t), t, top) for t, top in zip((reduce_s, hop_s), tops, strict=True)
    ]
    random = np.random.default_rng(0)
    shape, count = (stages, slots), stages * slots
    samples = [
        _price(random.permutation(len(hop_s))[:count].reshape(shape), *mild)
        for _ in range(NUM_SAMPLES)
    ]
    dearest = 2.0 * (tops[0] * slots + tops[1] * stages) + 1.0
    finite = [np.where(np.isfinite(table), table, dearest) for table in (reduce_s, hop_s)]
    return GridProblem(
        reduce_s=np.ascontiguousarray(finite[0]),
        hop_s=np.ascontiguousarray(finite[1]),
        charge_s=np.zeros((len(hop_s), stages)),
        pin=pin,
        slots=slots,
        scale_s=float(np.mean(samples)),
    )
