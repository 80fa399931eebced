"""Second holders: every stage's state lies on two machines, also where one hosts all its slots."""

from collections.abc import Callable, Mapping, Sequence

from swarmnode.coordinator.cost.needs import machine_bytes, stage_needs
from swarmnode.coordinator.solver.decision import Decision
from swarmnode.domain import Advert, ModelFacts, PeerId
from swarmnode.manifest import PlacedJob

NUM_HOLDERS = 2
MIN_VOTERS = 3
"""Of two, one alone is no majority: idle machines vote too where fewer hold anything."""
MAX_VOTERS = 7
"""More would make every agreement slower, and no safer against what happens at home."""


def choose_shadows(
    decision: Decision,
    peers: Sequence[Advert],
    facts: ModelFacts,
    job: PlacedJob,
    holds: Callable[[int, PeerId], bool],
    is_near: Callable[[int, PeerId], bool] = lambda _stage, _peer: True,
) -> tuple[tuple[PeerId, ...], ...]:
    """Who shadows each stage: nobody where two machines host it, or where nobody has room and,
    as `is_near` says, the state at hand, or soon.

    First goes who has a device of the kind of a host's, as another kind may compute other bits;
    then who holds the stage already, then who hosts least, then who has most memory.
    """
    hosts = [frozenset(row) for row in decision.slots]
    if not job.num_steps or all(len(row) >= NUM_HOLDERS for row in hosts):
        return tuple(() for _ in hosts)
    needs = stage_needs(facts, job, decision.layers)
    carried: dict[PeerId, list[int]] = {advert.peer: [] for advert in peers}
    for stage, slots in enumerate(decision.slots):
        for peer in slots:
            carried.setdefault(peer, []).append(stage)

    def room(advert: Advert, stage: int) -> float:
        limit = min(advert.limits.memory_bytes, advert.device.memory_total_bytes)
        return limit - machine_bytes(needs, [*carried[advert.peer], stage])

    found: list[tuple[PeerId, ...]] = []
    for stage, row in enumerate(hosts):
        kinds = {advert.device.kind for advert in peers if advert.peer in row}
        chosen: list[PeerId] = []
        while len(row) + len(chosen) < NUM_HOLDERS:
            able = [
                a
                for a in peers
                if a.peer not in row
                and a.peer not in chosen
                and room(a, stage) >= 0
                and is_near(stage, a.peer)
            ]
            if not able:
                break
            best = min(
                able,
                key=lambda a: (
                    a.device.kind not in kinds, not holds(stage, a.peer),
                    len(carried[a.peer]), -room(a, stage), a.peer,
                ),
            )  # fmt: skip
            chosen.append(best.peer)
            carried[best.peer].append(stage)
        found.append(tuple(chosen))
    return tuple(found)


def choose_voters(
    me: PeerId,
    slots: Sequence[Sequence[PeerId]],
    shadows: Sequence[Sequence[PeerId]],
    granted: Mapping[PeerId, object],
) -> tuple[PeerId, ...]:
    """Who decides about the next generation, in order of succession: `me`, then the holders, then
    idle machines if there are too few."""
    holders = [peer for grid in (slots, shadows) for row in grid for peer in row]
    voters = [peer for peer in dict.fromkeys((me, *holders)) if peer in granted][:MAX_VOTERS]
    idle = sorted(granted.keys() - set(voters))
    return (*voters, *idle[: max(0, MIN_VOTERS - len(voters))])
