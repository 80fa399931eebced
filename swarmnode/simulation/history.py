"""Training without tensors: the same data flow on hashes, and what an undisturbed run makes of it.

A stage's state is a chain of hashes over its updates, so equal hashes mean equal weights. An
update holds, beside its hash, how often each microbatch is in it. Chains depend on the order of
what goes in, as sums of floating-point numbers do.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from swarmnode.domain import BlobRef
from swarmnode.manifest import Manifest
from swarmnode.updates import UpdateIndex, index_update

HASH_BYTES = 8


def mix(*parts: bytes | int | str) -> bytes:
    """A hash over all parts, in their order."""
    state = hashlib.blake2b(digest_size=HASH_BYTES)
    for part in parts:
        if isinstance(part, bytes):
            state.update(part)
        else:
            state.update(str(part).encode())
        state.update(b"|")
    return state.digest()


# ---- what each machine computes ------------------------------------------------------------------


def initial_state(seed: int, stage: int) -> bytes:
    return mix("state", seed, stage)


def tokens(seed: int, step: int, microbatch: int, *, held_out: bool = False) -> bytes:
    return mix("held out" if held_out else "tokens", seed, step, microbatch)


def forward(state: bytes, inputs: bytes) -> bytes:
    return mix("forward", state, inputs)


def loss_of(output: bytes) -> float:
    """A number between 1 and 2."""
    return 1.0 + int.from_bytes(output[:4], "big") / 2**32


def loss_gradient(output: bytes) -> bytes:
    return mix("loss", output)


def backward(state: bytes, inputs: bytes, gradient: bytes) -> bytes:
    return mix("backward", state, inputs, gradient)


@dataclass
class Accumulator:
    """A slot's own gradient: a chain over its microbatches, and how often each is in it."""

    chain: bytes
    counts: bytearray

    @classmethod
    def empty(cls, num_microbatches: int) -> "Accumulator":
        return cls(bytes(HASH_BYTES), bytearray(num_microbatches))

    def add(self, state: bytes, microbatch: int, inputs: bytes, gradient: bytes) -> None:
        self.chain = mix("gradient", self.chain, state, inputs, gradient)
        self.counts[microbatch] += 1

    def share(self, part: int) -> bytes:
        return mix("share", self.chain, part) + self.counts


def add_share(total: bytes, share: bytes) -> bytes:
    """A shard's sum with one more slot's share in it."""
    counts = bytes(
        min(255, a + b) for a, b in zip(total[HASH_BYTES:], share[HASH_BYTES:], strict=True)
    )
    return mix("sum", total[:HASH_BYTES], share[:HASH_BYTES]) + counts


def empty_sum(num_microbatches: int) -> bytes:
    return bytes(HASH_BYTES + num_microbatches)


def sum_of_squares(update: bytes) -> float:
    return 1.0 + update[0]


def apply_update(state: bytes, update: bytes, scale: float) -> bytes:
    return mix("apply", state, update, scale.hex())


# ---- what an undisturbed run gives ---------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step of the undisturbed run."""

    updates: tuple[BlobRef, ...]
    scale: float


@dataclass
class History:
    """The run without any fault, computed as far as somebody asks."""

    seed: int
    num_stages: int
    num_slots: int
    num_microbatches: int
    clip_norm: float

    def __post_init__(self) -> None:
        stages = range(self.num_stages)
        self._states = [[initial_state(self.seed, stage)] for stage in stages]
        self._steps: list[Step] = []

    @classmethod
    def of(cls, manifest: Manifest) -> "History":
        return cls(
            manifest.run.seed,
            manifest.placement.stages,
            manifest.placement.slots,
            manifest.batch.num_microbatches,
            manifest.optimizer.clip_norm,
        )

    def state(self, stage: int, step: int) -> bytes:
        """The state of a stage after `step` committed steps."""
        while len(self._steps) < step:
            self._compute()
        return self._states[stage][step]

    def step(self, step: int) -> Step:
        while len(self._steps) <= step:
            self._compute()
        return self._steps[step]

    def _compute(self) -> None:
        step = len(self._steps)
        states = [known[step] for known in self._states]
        inputs, gradients = self._flow(states, step)
        updates = [
            self._update(state, inputs[stage], gradients[stage])
            for stage, state in enumerate(states)
        ]
        scale = clip_scale([sum_of_squares(update) for update in updates], self.clip_norm)
        for stage, update in enumerate(updates):
            self._states[stage].append(apply_update(states[stage], update, scale))
        refs = tuple(update_index(step, update).ref for update in updates)
        self._steps.append(Step(refs, scale))

    def _flow(self, states: Sequence[bytes], step: int) -> tuple[list[list[bytes]], ...]:
        """By stage and microbatch: what went in, and the gradient that came back."""
        inputs: list[list[bytes]] = [[] for _ in states]
        gradients: list[list[bytes]] = [[b""] * self.num_microbatches for _ in states]
        for microbatch in range(self.num_microbatches):
            value = tokens(self.seed, step, microbatch)
            for stage, state in enumerate(states):
                inputs[stage].append(value)
                value = forward(state, value)
            value = loss_gradient(value)
            for stage in reversed(range(self.num_stages)):
                gradients[stage][microbatch] = value
                value = backward(states[stage], inputs[stage][microbatch], value)
        return inputs, gradients

    def _update(self, state: bytes, inputs: Sequence[bytes], gradients: Sequence[bytes]) -> bytes:
        slots = []
        for slot in range(self.num_slots):
            slots.append(gradient := Accumulator.empty(self.num_microbatches))
            for microbatch in range(slot, self.num_microbatches, self.num_slots):
                gradient.add(state, microbatch, inputs[microbatch], gradients[microbatch])
        shards = []
        for part in range(self.num_slots):
            total = empty_sum(self.num_microbatches)
            for gradient in slots:
                total = add_share(total, gradient.share(part))
            shards.append(total)
        return b"".join(shards)


def clip_scale(squares: Sequence[float], clip_norm: float) -> float:
    """As `Votes.commit` computes it."""
    norm = math.sqrt(math.fsum(squares))
    return 1.0 if clip_norm == 0 else min(1.0, clip_norm / (norm + 1e-6))


@lru_cache(maxsize=4096)
def update_index(step: int, update: bytes) -> UpdateIndex:
    return index_update(step, [update])
