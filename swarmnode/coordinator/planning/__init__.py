"""From what a user hands over to a problem that `search.solve` can solve.

Whatever the solver is made of (numba, scipy) is imported only when a problem is built, so that
this package itself weighs nothing. No printing, no clock, no files.
"""

from swarmnode.coordinator.objective import Effort
from swarmnode.coordinator.planning.dtfm import dtfm_problem
from swarmnode.coordinator.planning.inputs import read_topology
from swarmnode.coordinator.planning.problem import (
    DEFAULT_HORIZON_STEPS,
    Problem,
    Wanted,
    alive,
    asked_grid,
)
from swarmnode.coordinator.planning.serving import serving_problem
from swarmnode.coordinator.planning.training import training_problem
from swarmnode.errors import DataError

__all__ = ["DEFAULT_HORIZON_STEPS", "Problem", "Wanted", "build"]


def build(wanted: Wanted, effort: Effort) -> Problem:
    """The problem that `wanted` describes; `effort` limits the search for a grid left open.

    Raises: DataError or CapacityError with one line that says what to mend.
    """
    if wanted.objective == "serving":
        return serving_problem(wanted)
    whole = read_topology(wanted.network)
    nodes = alive(whole.num_nodes, wanted.gone)
    topology = whole.take(nodes)
    grid = asked_grid(wanted)
    if wanted.objective == "dtfm":
        return dtfm_problem(wanted, topology, nodes, grid, effort)
    if wanted.objective == "training":
        return training_problem(wanted, whole, topology, nodes, grid, effort)
    raise DataError(f"the objective {wanted.objective!r:.40} is none of dtfm, training, serving")
