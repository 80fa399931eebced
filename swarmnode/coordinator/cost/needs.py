"""What a placement needs and costs: memory per stage and a predicted time per step.

The prediction is a first, simple one: the slowest machine's compute, with the pipeline's ramp.
Links are not in it yet.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from swarmnode.domain import Advert, ModelFacts, PeerId
from swarmnode.manifest import JobBase

BYTES_PER_WEIGHT = 4
BYTES_PER_TRAINED_WEIGHT = 24
"""float32 weight, two moments, the step's gradient sum, the reduced gradient and the copy that a
snapshot takes."""
SLOT_BYTES_PER_WEIGHT = 4
"""Each further slot on a machine keeps a gradient sum of its own."""
ACTIVATION_FACTOR = 40
"""Kept bytes per token, layer and hidden unit while a microbatch waits for its backward pass:
attention and MLP intermediates in float32, measured loosely from above."""
COMPUTE_EFFICIENCY = 0.4
"""Share of the measured matrix FLOP/s that a small transformer reaches."""


@dataclass(frozen=True)
class StageNeed:
    """What one stage asks of a machine that hosts it."""

    weights: int
    state_bytes: int
    """For the first slot of the stage on a machine."""
    slot_bytes: int
    """For every slot, the first included: gradient sum and kept activations."""
    flops: float
    """Forward and backward of one microbatch."""


def split_layers(num_layers: int, num_stages: int) -> tuple[tuple[int, int], ...]:
    """Cut `num_layers` into `num_stages` near-equal half-open ranges, longer ones first."""
    short, extra = divmod(num_layers, num_stages)
    cuts = [0]
    for stage in range(num_stages):
        cuts.append(cuts[-1] + short + (stage < extra))
    return tuple(pairwise(cuts))


def stage_needs(
    facts: ModelFacts, job: JobBase, layers: Sequence[tuple[int, int]]
) -> tuple[StageNeed, ...]:
    """What each stage needs: training state, or weights alone when the job only serves."""
    tokens = job.batch.rows * job.batch.sequence_length
    trains = job.num_steps > 0
    needs = []
    for stage, (start, stop) in enumerate(layers):
        weights = (stop - start) * facts.layer_weights
        multiplied = weights
        if stage == 0:
            weights += facts.first_weights
        if stage == len(layers) - 1:
            head = facts.last_weights + (facts.first_weights if facts.tied and stage else 0)
            weights += head
            multiplied += head
        kept = tokens * facts.hidden_size * ACTIVATION_FACTOR * (stop - start)
        in_flight = min(len(layers) - stage, job.batch.num_microbatches)
        needs.append(
            StageNeed(
                weights=weights,
                state_bytes=weights * (BYTES_PER_TRAINED_WEIGHT if trains else BYTES_PER_WEIGHT),
                slot_bytes=(weights * SLOT_BYTES_PER_WEIGHT + kept * in_flight) if trains else 0,
                flops=6.0 * multiplied * tokens,
            )
        )
    return tuple(needs)


def machine_bytes(needs: Sequence[StageNeed], stages: Sequence[int]) -> int:
    """Memory that a machine needs which hosts one slot of each of `stages` (with repeats)."""
    return sum(needs[s].slot_bytes for s in stages) + sum(needs[s].state_bytes for s in set(stages))


def step_seconds(
    needs: Sequence[StageNeed],
    hosted: Mapping[PeerId, Sequence[int]],
    peers: Mapping[PeerId, Advert],
    job: JobBase,
) -> float:
    """Seconds of a step: the busiest machine's compute, plus the ramp of the pipeline."""
    per_slot = job.batch.num_microbatches // job.placement.slots
    dtype = job.run.compute
    busiest = 0.0
    ramp = 0.0
    for peer, stages in hosted.items():
        speed = COMPUTE_EFFICIENCY * peers[peer].device.flops.get(dtype, 0.0)
        if speed <= 0.0:
            speed = COMPUTE_EFFICIENCY * max(peers[peer].device.flops.values(), default=1.0)
        one = [needs[s].flops / speed for s in stages]
        busiest = max(busiest, per_slot * sum(one))
        ramp = max([ramp, *one])
    return busiest + (job.placement.stages - 1) * ramp
