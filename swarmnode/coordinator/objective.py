"""The interface between the solver and the costs that plug into it.

Nodes are indices into a Topology here; whoever calls translates from and to peers. A cost is
always in seconds and the lower one is better, so that serving minimises seconds per token.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from swarmnode.coordinator.topology import Topology

NOBODY = -1
"""In a previous placement: the node that held this slot is gone."""


@dataclass(frozen=True)
class Arrangement:
    """Which node hosts which slot, and which layers each stage has."""

    slots: tuple[tuple[int, ...], ...]
    """slots[stage][slot] is a node. Training: every row has V slots and columns are pipelines, a
    node may appear again. Serving with free ranges: row r lists the nodes that hold layers[r]."""
    layers: tuple[tuple[int, int], ...]
    """Per stage: the half-open range of layers; may overlap only in serving with free ranges."""

    @property
    def nodes(self) -> tuple[int, ...]:
        """Every node that hosts a slot, sorted, once."""
        return tuple(sorted({node for row in self.slots for node in row if node != NOBODY}))


@dataclass(frozen=True)
class Price:
    """What an arrangement costs, and what the cost is made of."""

    total_s: float
    parts: Mapping[str, float]
    """By name, in the unit that the name's suffix says."""


@dataclass(frozen=True)
class Bound:
    """No arrangement costs less than `seconds`; `why` names the argument."""

    seconds: float
    why: str


@dataclass(frozen=True)
class Previous:
    """The placement that runs now, and what leaving it costs."""

    arrangement: Arrangement
    """In indices of the new topology; NOBODY where the host is gone."""
    charge_s: NDArray[np.float64]
    """Shapes: (N, S). What the objective is raised by if a node hosts a stage: the seconds to
    fetch the state over the steps until the next change; 0 where the node holds the stage and for
    a node that held nothing."""


@dataclass(frozen=True)
class Effort:
    """How hard to search. The same effort gives the same answer, unless `should_stop` cuts it."""

    moves: int = 2_000_000
    """Arrangements to try, in all restarts together."""
    seed: int = 0
    should_stop: Callable[[], bool] = field(default=lambda: False)
    """Asked at least every few tenths of a second; the shell's budget in seconds."""
    report: Callable[[float, float], None] = field(default=lambda _done, _best: None)
    """Told the share of the moves that is done and the best cost so far."""


@dataclass(frozen=True)
class Found:
    """What a search found."""

    arrangement: Arrangement
    moves_done: int
    is_optimal: bool = False
    """Whether an exact method proved that nothing costs less (charges included)."""
    reasons: tuple[str, ...] = ()
    """What the search did that a reader should know: seeds tried, the proof, why it stopped."""


class Objective(Protocol):
    """One cost over one swarm: prices arrangements and knows how to find and bound good ones."""

    name: str
    topology: Topology

    def price(self, arrangement: Arrangement) -> Price:
        """What `arrangement` costs, without any charge for moving."""
        ...

    def charged_s(self, arrangement: Arrangement, previous: Previous | None) -> float:
        """What leaving `previous` adds to the cost of `arrangement`."""
        ...

    def first(self, previous: Previous | None) -> Arrangement:
        """A valid arrangement at once (below 100 ms for 64 nodes), close to `previous`.

        Raises: CapacityError with one line that says what is missing.
        """
        ...

    def search(self, start: Arrangement, previous: Previous | None, effort: Effort) -> Found:
        """The best arrangement found: price plus the charges of `previous`.

        Never worse than `start`, obeys pins and memory caps.
        """
        ...

    def bound(self, effort: Effort) -> Bound | None:
        """A proven lower bound of every arrangement's price, if there is a useful one."""
        ...

    def explain(self, arrangement: Arrangement) -> tuple[str, ...]:
        """In words, one line each: why each node is where it is, what bounds the cost, and what
        one more node or a faster link would bring."""
        ...


def charged_s(arrangement: Arrangement, previous: Previous | None) -> float:
    """The charges for every (node, stage) that `arrangement` hosts, each counted once."""
    if previous is None:
        return 0.0
    hosted = {(node, s) for s, row in enumerate(arrangement.slots) for node in row}
    return float(sum(previous.charge_s[node, stage] for node, stage in sorted(hosted)))
