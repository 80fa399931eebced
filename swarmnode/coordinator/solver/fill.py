"""Fill the grid of stages and slots with machines, by measured speed and memory.

The first answer, at once and without libraries; `search` looks for the best, aside. Keep every
slot whose machine is alive, then give each open slot to an idle machine, else to one that already
holds the stage, else to one that makes a second holder of it; among those, to the one that would
be done soonest. It states no bound, and says so.
"""

from collections.abc import Callable, Sequence

from swarmnode.coordinator.cost.needs import (
    machine_bytes,
    ranges_of,
    split_layers,
    stage_needs,
    step_seconds,
)
from swarmnode.coordinator.solver.decision import Decision
from swarmnode.domain import Advert, ModelFacts, PeerId, Plan, SlotId
from swarmnode.errors import CapacityError, ManifestError
from swarmnode.manifest import PlacedJob


def stage_ranges(facts: ModelFacts, job: PlacedJob) -> tuple[tuple[int, int], ...]:
    """The layers of each stage as the job decided them, or near-equal ones.

    Raises: ManifestError if the decided ones are not the model's.
    """
    counts = job.placement.layers
    if counts is None:
        return split_layers(facts.num_layers, job.placement.stages)
    if len(counts) != job.placement.stages or sum(counts) != facts.num_layers:
        raise ManifestError(
            f"placement.layers = {list(counts)} does not cut {facts.num_layers} layers into "
            f"{job.placement.stages} stages"
        )
    return ranges_of(counts)


def solve(
    peers: Sequence[Advert],
    facts: ModelFacts,
    job: PlacedJob,
    *,
    previous: Plan | None = None,
    is_near: Callable[[int, PeerId], bool] = lambda _stage, _peer: True,
) -> Decision:
    """Place every slot of `job` on `peers`; slots of `previous` whose machine is alive stay.

    Who has a stage at hand, or soon, as `is_near` says, gets its slots before anybody else.

    Raises: CapacityError with one line that says what is missing.
    """
    stages, slots = job.placement.stages, job.placement.slots
    if facts.num_layers < stages:
        raise CapacityError(
            f"the model has {facts.num_layers} layers, too few for {stages} stages; "
            "lower placement.stages"
        )
    fewest = job.placement.fewest_peers
    if len(peers) < fewest:
        raise CapacityError(
            f"{len(peers)} of {fewest} peers are here for {stages} stages x {slots} slots; "
            "start more with `swarmnode up --join`, or lower placement.min_peers"
        )
    layers = stage_ranges(facts, job)
    needs = stage_needs(facts, job, layers)
    by_id = {advert.peer: advert for advert in peers}
    hosted: dict[PeerId, list[int]] = {peer: [] for peer in sorted(by_id)}
    had: dict[PeerId, set[int]] = {peer: set() for peer in by_id}
    grid: list[list[PeerId | None]] = [[None] * slots for _ in range(stages)]
    reasons: list[str] = []

    def fits(peer: PeerId, stage: int) -> bool:
        advert = by_id[peer]
        room = min(advert.limits.memory_bytes, advert.device.memory_total_bytes)
        is_allowed = job.placement.pins.get(peer, stage) == stage
        return is_allowed and machine_bytes(needs, [*hosted[peer], stage]) <= room

    if previous is not None and previous.layers == layers and previous.num_slots == slots:
        for stage, row in enumerate(previous.slots):
            for slot, peer in enumerate(row):
                if peer in by_id:
                    had[peer].add(stage)
                    if fits(peer, stage):
                        grid[stage][slot] = peer
                        hosted[peer].append(stage)

    def finish_s(peer: PeerId, stage: int) -> float:
        flops = max(by_id[peer].device.flops.values(), default=0.0)
        return sum(needs[s].flops for s in [*hosted[peer], stage]) / max(flops, 1.0)

    open_slots = [SlotId(s, v) for v in range(slots) for s in range(stages) if grid[s][v] is None]
    moved: list[SlotId] = []
    for stage, slot in sorted(open_slots, key=lambda at: (-needs[at.stage].flops, at)):
        fitting = [peer for peer in hosted if fits(peer, stage)]
        able = [peer for peer in fitting if is_near(stage, peer)] or fitting
        if not able:
            largest = max(by_id.values(), key=lambda a: (a.limits.memory_bytes, a.peer))
            raise CapacityError(
                f"stage {stage} of {stages} needs "
                f"{machine_bytes(needs, [stage]) / 2**30:.2f} GiB on one machine and no peer has "
                f"that left (largest: {largest.limits.memory_bytes / 2**30:.2f} GiB); add peers, "
                "raise placement.stages or lower batch.rows"
            )
        idle = [peer for peer in able if not hosted[peer]]
        holding = [peer for peer in able if stage in had[peer]]
        second = [peer for peer in able if stage not in hosted[peer]]
        pool = idle or holding or second or able
        best = min(pool, key=lambda p: (stage not in had[p], finish_s(p, stage), p))
        why = "idle" if best in idle else "holds the stage" if best in holding else "soonest done"
        reasons.append(f"stage {stage} slot {slot}: {best[-6:]} ({why})")
        grid[stage][slot] = best
        hosted[best].append(stage)
        if stage not in had[best]:
            moved.append(SlotId(stage, slot))
    kept = stages * slots - len(open_slots)
    if kept:
        reasons.insert(0, f"{kept} of {stages * slots} slots stay where they are")
    placed = {peer: on for peer, on in hosted.items() if on}
    return Decision(
        layers=layers,
        slots=tuple(tuple(peer for peer in row if peer is not None) for row in grid),
        cost_s=step_seconds(needs, placed, by_id, job),
        bound_s=None,
        reasons=tuple(reasons),
        moved=tuple(moved),
    )
