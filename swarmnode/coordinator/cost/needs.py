"""What a job asks of machines: a workload in numbers, and the memory and work of each stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from swarmnode.codec_specs import wire_share
from swarmnode.coordinator.topology import Matrix
from swarmnode.domain import Advert, ModelFacts, PeerId
from swarmnode.manifest import JobBase, PlacedJob

BYTES_PER_WEIGHT = 4
BYTES_PER_TRAINED_WEIGHT = 24
"""float32 weight, two moments, the step's gradient sum, the reduced gradient and the copy that a
snapshot takes."""
SLOT_BYTES_PER_WEIGHT = 4
"""Each further slot on a machine keeps a gradient sum of its own."""
FEEDBACK_BYTES_PER_WEIGHT = 16
"""With error feedback, what a slot owes and what it is about to owe: for its shares, and, where it
is the only slot, as much for the sums."""
LOCAL_BYTES_PER_WEIGHT = 20
"""With local steps, what a slot has of its own: weights, two moments, and those moments as the last
commit left them."""
ACTIVATION_FACTOR = 40
"""Kept bytes per token, layer and hidden unit while a microbatch waits for its backward pass:
attention and MLP intermediates in float32, measured loosely from above."""
LOGIT_FACTOR = 12
"""Bytes per token and word of the vocabulary at the last stage: logits, their softmax, its
gradient, in float32, of one microbatch at a time."""
TOUCHED_BYTES_PER_WEIGHT = 24
"""Memory traffic of one microbatch: the weight read twice, its gradient written, then added."""
COMPUTE_EFFICIENCY = 0.4
"""Share of the measured matrix FLOP/s that a small transformer reaches."""


@dataclass(frozen=True)
class StageNeed:
    """What one stage asks of a machine that hosts it."""

    weights: int
    state_bytes: int
    """For the first slot of the stage on a machine."""
    slot_bytes: int
    """For every slot, the first included: gradient sum, kept activations and delta caches."""
    flops: float
    """Forward and backward of one microbatch."""
    touched_bytes: float = 0.0
    """Memory traffic of one microbatch, forward and backward."""


@dataclass(frozen=True, eq=False)
class Workload:
    """One training step of one job, in numbers. All layers are alike.

    With local steps it is one of those; `reduce_every` of them are committed as one.
    """

    num_layers: int
    layer_flops: float
    """Forward and backward of one microbatch through one layer; so are the next two."""
    first_flops: float
    """What the first stage does besides its layers."""
    last_flops: float
    """What the last stage does besides its layers: the head."""
    layer_weights: int
    first_weights: int
    last_weights: int
    tied: bool
    """Whether the head is the embedding: then first and last stage both hold `first_weights`."""
    num_microbatches: int
    """Of all pipelines together."""
    activation_bytes: float
    """One microbatch at a boundary between stages, uncoded; its gradient is as large."""
    kept_bytes_per_layer: int
    """Of one microbatch in flight."""
    last_kept_bytes: int = 0
    """Of the head's intermediates, in the last stage."""
    gradient_bytes_per_weight: float = 4.0
    """Uncoded."""
    activation_share: float | Matrix = 1.0
    """Bytes on the wire over uncoded bytes; one number, or one for each link, (N, N)."""
    activation_gradient_share: float | Matrix = 1.0
    gradient_share: float | Matrix = 1.0
    backward_share: float = 2.0 / 3.0
    """Of a microbatch's work in a stage."""
    reduce_every: int = 1
    """Steps between reductions, H."""
    gathers: bool = False
    """Whether a slot's whole share goes to every other slot, who sum alike; else to owners of
    shards, who send the sum back."""
    staleness: int = 0
    """1: a reduction runs beside the next step and costs only what exceeds it."""
    state_bytes_per_weight: int = BYTES_PER_TRAINED_WEIGHT
    slot_bytes_per_weight: int = SLOT_BYTES_PER_WEIGHT
    touched_bytes_per_weight: float = TOUCHED_BYTES_PER_WEIGHT
    ahead: int = 0
    """Microbatches that stages but the last run forward beyond the usual depth."""
    cache_bytes: int = 0
    """Of the memory for hidden states at each end of a boundary of a slot."""

    def weights(self, stage: int, num_stages: int, num_layers: int) -> int:
        """Weights of stage `stage` of `num_stages` with so many layers."""
        is_first, is_last = stage == 0, stage == num_stages - 1
        copy = self.first_weights if self.tied and not is_first else 0
        ends = is_first * self.first_weights + is_last * (self.last_weights + copy)
        return num_layers * self.layer_weights + ends

    def needs(self, layers: Sequence[tuple[int, int]], num_slots: int) -> tuple[StageNeed, ...]:
        """What each stage needs when the job runs as `num_slots` pipelines."""
        return tuple(
            self._need(stage, len(layers), stop - start, num_slots)
            for stage, (start, stop) in enumerate(layers)
        )

    def _need(self, stage: int, num_stages: int, num_layers: int, num_slots: int) -> StageNeed:
        weights = self.weights(stage, num_stages, num_layers)
        is_first, is_last = stage == 0, stage == num_stages - 1
        depth = num_stages - stage + (0 if is_last else self.ahead)
        in_flight = min(depth, max(1, self.num_microbatches // num_slots))
        layer_kept = num_layers * self.kept_bytes_per_layer
        last_kept = is_last * self.last_kept_bytes
        caches = self.cache_bytes * ((not is_first) + (not is_last))
        return StageNeed(
            weights=weights,
            state_bytes=weights * self.state_bytes_per_weight,
            slot_bytes=weights * self.slot_bytes_per_weight
            + layer_kept * in_flight
            + last_kept
            + caches,
            flops=num_layers * self.layer_flops
            + is_first * self.first_flops
            + is_last * self.last_flops,
            touched_bytes=weights * self.touched_bytes_per_weight + 2 * (layer_kept + last_kept),
        )


def workload_of(facts: ModelFacts, job: JobBase) -> Workload:
    """The workload of a job; one that only serves needs weights alone, and reduces nothing."""
    tokens = job.batch.rows * job.batch.sequence_length
    trains = job.num_steps > 0
    head = facts.last_weights + (facts.first_weights if facts.tied else 0)
    attention = 12.0 * job.batch.sequence_length * facts.hidden_size
    boundary = (job.batch.rows, job.batch.sequence_length, facts.hidden_size)
    codecs, own = job.codecs, SLOT_BYTES_PER_WEIGHT
    own += FEEDBACK_BYTES_PER_WEIGHT if codecs.keeps_residuals else 0
    own += LOCAL_BYTES_PER_WEIGHT if codecs.local is not None else 0
    has_caches = trains and codecs.keeps_deltas and not codecs.delta_cache_on_disk
    return Workload(
        num_layers=facts.num_layers,
        layer_flops=(6.0 * facts.layer_weights + attention) * tokens,
        first_flops=0.0,
        last_flops=6.0 * head * tokens,
        layer_weights=facts.layer_weights,
        first_weights=facts.first_weights,
        last_weights=facts.last_weights,
        tied=facts.tied,
        num_microbatches=job.batch.num_microbatches,
        activation_bytes=4.0 * tokens * facts.hidden_size,
        kept_bytes_per_layer=tokens * facts.hidden_size * ACTIVATION_FACTOR if trains else 0,
        last_kept_bytes=tokens * facts.vocab_size * LOGIT_FACTOR if trains else 0,
        activation_share=wire_share(job.codecs.activation, boundary),
        activation_gradient_share=wire_share(job.codecs.activation_gradient, boundary),
        gradient_share=wire_share(codecs.share),
        reduce_every=codecs.num_local_steps,
        gathers=codecs.gathers,
        state_bytes_per_weight=BYTES_PER_TRAINED_WEIGHT if trains else BYTES_PER_WEIGHT,
        slot_bytes_per_weight=own if trains else 0,
        ahead=job.run.ahead,
        cache_bytes=codecs.delta_cache_bytes if has_caches else 0,
    )


def token_workload(facts: ModelFacts, job: PlacedJob) -> Workload:
    """One token through every pipeline, as a step: what serving asks of the same machines.

    Weights are read once, hidden states go uncoded, nothing comes back and nothing is applied.
    """
    head = facts.last_weights + (facts.first_weights if facts.tied else 0)
    return replace(
        workload_of(facts, job),
        num_microbatches=job.placement.slots,
        layer_flops=2.0 * facts.layer_weights,
        last_flops=2.0 * head,
        activation_bytes=4.0 * facts.hidden_size,
        activation_share=1.0,
        activation_gradient_share=0.0,
        gradient_bytes_per_weight=0.0,
        kept_bytes_per_layer=0,
        last_kept_bytes=0,
        reduce_every=1,
        backward_share=0.0,
        touched_bytes_per_weight=4.0,
    )


def split_layers(num_layers: int, num_stages: int) -> tuple[tuple[int, int], ...]:
    """Cut `num_layers` into `num_stages` near-equal half-open ranges, longer ones first."""
    short, extra = divmod(num_layers, num_stages)
    return ranges_of([short + (stage < extra) for stage in range(num_stages)])


def ranges_of(counts: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Half-open ranges of layers, one after the other, of these sizes."""
    cuts = [0]
    for count in counts:
        cuts.append(cuts[-1] + int(count))
    return tuple(pairwise(cuts))


def stage_needs(
    facts: ModelFacts, job: PlacedJob, layers: Sequence[tuple[int, int]]
) -> tuple[StageNeed, ...]:
    """What each stage needs: training state, or weights alone when the job only serves."""
    return workload_of(facts, job).needs(layers, job.placement.slots)


def machine_bytes(needs: Sequence[StageNeed], stages: Sequence[int]) -> int:
    """Memory that a machine needs which hosts one slot of each of `stages` (with repeats)."""
    return sum(needs[s].slot_bytes for s in stages) + sum(needs[s].state_bytes for s in set(stages))


def effective_flops(advert: Advert, job: JobBase) -> float:
    """FLOP/s that a machine reaches on `job`: of its dtype where measured, else of its best."""
    measured = advert.device.flops
    speed = measured.get(job.run.compute, 0.0) or max(measured.values(), default=0.0)
    return COMPUTE_EFFICIENCY * speed if speed > 0.0 else 1.0


def step_seconds(
    needs: Sequence[StageNeed],
    hosted: Mapping[PeerId, Sequence[int]],
    peers: Mapping[PeerId, Advert],
    job: PlacedJob,
) -> float:
    """Seconds of a step without links: the busiest machine's compute, and the pipeline's ramp."""
    per_slot = job.microbatches_per_step // job.placement.slots
    busiest = 0.0
    ramp = 0.0
    for peer, stages in hosted.items():
        speed = effective_flops(peers[peer], job)
        one = [needs[s].flops / speed for s in stages]
        busiest = max(busiest, per_slot * sum(one))
        ramp = max([ramp, *one])
    return busiest + (job.placement.stages - 1) * ramp
