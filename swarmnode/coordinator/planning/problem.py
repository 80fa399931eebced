"""What is asked for, what it becomes, and what all objectives share on the way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from swarmnode.coordinator.objective import (
    NOBODY,
    Arrangement,
    Bound,
    Effort,
    Found,
    Objective,
    Previous,
    Price,
)
from swarmnode.coordinator.planning.inputs import EarlierPlan, Machine, read_machines, read_pins
from swarmnode.coordinator.planning.loads import Loads
from swarmnode.coordinator.topology import Topology
from swarmnode.coordinator.transition import charges
from swarmnode.domain import ModelFacts
from swarmnode.errors import CapacityError, DataError
from swarmnode.manifest import JobFile

DEFAULT_HORIZON_STEPS = 100.0
"""Steps to the next change of the swarm: how long a move may take to pay."""
DEFAULT_CONTEXT = 2048
BYTES_PER_STATE_WEIGHT = 12
"""A float32 weight and two moments: what a newcomer to a stage must fetch."""


@dataclass(frozen=True)
class Wanted:
    """What is asked for; `None` leaves a choice open."""

    objective: str
    network: Mapping[str, Any]
    nodes: object = None
    """The JSON of a nodes file."""
    model: ModelFacts | None = None
    job: JobFile | None = None
    batch: Mapping[str, int] = field(default_factory=dict)
    """Fields of BatchConfig that were given on their own."""
    stages: int | None = None
    slots: int | None = None
    pins: tuple[str, ...] = ()
    earlier: EarlierPlan | None = None
    gone: frozenset[int] = frozenset()
    horizon_steps: float = DEFAULT_HORIZON_STEPS
    most_moved: int | None = None
    """Most survivors that a repair may send to another stage, whatever it would save."""
    gradient_bytes: float | None = None
    activation_bytes: float | None = None
    max_hops: int | None = None
    max_latency_s: float | None = None
    latency_weight: float = 0.0
    partial: bool = False
    context_tokens: int = DEFAULT_CONTEXT
    kv_share: float = 1.0
    """Width of the keys and values, of the hidden size."""


@dataclass(frozen=True, eq=False)
class Problem:
    """An objective with what is needed to read its answer."""

    objective: Objective
    nodes: tuple[int, ...]
    """The objective's node -> its index in the network file; dead ones are left out."""
    loads: Loads
    previous: Previous | None = None
    notes: tuple[str, ...] = ()
    """What was assumed or chosen, for the reader of the plan."""


class Seeded:
    """An objective that begins with an arrangement found before, where no plan runs yet."""

    def __init__(self, objective: Objective, start: Arrangement) -> None:
        self._objective = objective
        self._start = start
        self.name, self.topology = objective.name, objective.topology

    def price(self, arrangement: Arrangement) -> Price:
        """See Objective."""
        return self._objective.price(arrangement)

    def charged_s(self, arrangement: Arrangement, previous: Previous | None) -> float:
        """See Objective."""
        return self._objective.charged_s(arrangement, previous)

    def first(self, previous: Previous | None) -> Arrangement:
        """The arrangement found before; the objective's own answer where a plan runs."""
        return self._start if previous is None else self._objective.first(previous)

    def search(self, start: Arrangement, previous: Previous | None, effort: Effort) -> Found:
        """See Objective."""
        return self._objective.search(start, previous, effort)

    def bound(self, effort: Effort) -> Bound | None:
        """See Objective."""
        return self._objective.bound(effort)

    def explain(self, arrangement: Arrangement) -> tuple[str, ...]:
        """See Objective."""
        return self._objective.explain(arrangement)


def alive(count: int, gone: frozenset[int]) -> tuple[int, ...]:
    odd = sorted(node for node in gone if node >= count)
    if odd:
        raise DataError(f"node {odd[0]} is gone, but the network has only {count} nodes")
    alive = tuple(node for node in range(count) if node not in gone)
    if not alive:
        raise CapacityError("every node of the network is gone; nothing is left to plan on")
    return alive


def asked_grid(wanted: Wanted) -> tuple[int | None, int | None]:
    """Stages and slots as asked for, or those of the earlier plan."""
    if wanted.earlier is None:
        return wanted.stages, wanted.slots
    same_objective(wanted)
    rows = wanted.earlier.arrangement.slots
    stages, slots = len(rows), len(rows[0])
    if any(len(row) != slots for row in rows):
        raise DataError("the previous plan's stages have unequal numbers of slots: not a grid")
    if (wanted.stages or stages, wanted.slots or slots) != (stages, slots):
        raise DataError(
            f"the previous plan is {stages} stages x {slots} slots, not "
            f"{wanted.stages or stages} x {wanted.slots or slots}; ask for the same, or plan anew"
        )
    return stages, slots


def same_objective(wanted: Wanted) -> None:
    earlier = wanted.earlier
    if earlier is not None and earlier.objective not in ("", wanted.objective):
        raise DataError(
            f"the previous plan is for the objective {earlier.objective!r:.40}, "
            f"not {wanted.objective}"
        )


def check_room(count: int, stages: int, slots: int) -> None:
    if count < stages * slots:
        raise CapacityError(
            f"{stages} stages x {slots} slots need {stages * slots} nodes, and {count} are here; "
            "lower --stages or --slots"
        )


def stage_pins(
    wanted: Wanted, topology: Topology, nodes: Sequence[int], num_stages: int | None
) -> dict[int, int]:
    """`topology` is what is left of the network: `nodes`, by their index in its file."""
    return read_pins(wanted.pins, topology.names, num_stages, nodes)


def previous_of(
    wanted: Wanted, topology: Topology, nodes: Sequence[int], state_bytes: Sequence[float]
) -> Previous | None:
    """The earlier plan in the indices of the nodes that are left, with what leaving it costs."""
    if wanted.earlier is None:
        return None
    index = {node: i for i, node in enumerate(nodes)}
    earlier = wanted.earlier.arrangement
    most = max(nodes[-1], *wanted.gone, -1)
    beyond = sorted(node for node in earlier.nodes if node > most)
    if beyond:
        raise DataError(
            f"the previous plan has a node {beyond[0]}, the network only 0 to {most}; list dead "
            "nodes in --gone, and keep them in the network file"
        )
    if wanted.objective != "training":
        _check_once(earlier)
    slots = tuple(tuple(index.get(node, NOBODY) for node in row) for row in earlier.slots)
    arrangement = Arrangement(slots, earlier.layers)
    return charges(arrangement, topology, state_bytes, wanted.horizon_steps)


def _check_once(earlier: Arrangement) -> None:
    """Raises: DataError for a node with two places, where one is all that a node can have."""
    seen: set[int] = set()
    for node in (node for row in earlier.slots for node in row if node != NOBODY):
        if node in seen:
            raise DataError(f"the previous plan has node {node} in two places; give each node one")
        seen.add(node)


def check_split(layers: Sequence[tuple[int, int]], num_layers: int) -> None:
    """Raises: DataError unless the stages of the earlier plan split the layers of the model."""
    ends = [0, *(stop for _, stop in layers)]
    if [start for start, _ in layers] != ends[:-1] or ends[-1] != num_layers:
        raise DataError(
            f"the previous plan's layers {str(list(layers))[:60]} do not split the {num_layers} "
            "here, stage after stage; plan anew"
        )


def machines_of(wanted: Wanted, names: Sequence[str], nodes: Sequence[int]) -> list[Machine]:
    if wanted.nodes is None:
        return [Machine()] * len(nodes)
    machines = read_machines(wanted.nodes, names)
    return [machines[node] for node in nodes]
