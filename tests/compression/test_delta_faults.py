"""Both caches through loss, repetition, reordering, restarts and steps half committed.

A seed decides everything. The claims, after every frame:

    what the receiver computes on is, bit for bit, what the sender wrote down for that frame;
    where both ends hold the same version and checksum, they hold the same bits;
    a frame that was accepted leaves both ends with the same version and bits in its slot;
    and when the faults stop, every sample is refused at most once and then travels as a change.

With the checks of versions and checksums taken out, the same simulation finds them broken.
"""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from swarmnode.compression.delta import DeltaReceiver, DeltaSender
from swarmnode.compression.delta_cache import DeltaCache, Entry
from swarmnode.compression.delta_frames import Frame, unpack_frame
from swarmnode.errors import CodecError

NUM_SAMPLES, NUM_SLOTS, NUM_VALUES, NUM_STEPS, BATCH = 7, 5, 40, 25, 3
SPECS = ["aq/int4/32", "aq/int2/16", "aq/int3/16+hadamard", "aq/bf16"]


class TrustingReceiver(DeltaReceiver):
    """One that takes every frame at its word. The negative control."""

    def _follows(self, frame: Frame, entry: Entry | None) -> bool:
        return entry is not None or not frame.prefix.is_delta

    def _is_intact(self, frame: Frame, crc: int) -> bool:
        return True


class ForgetfulReceiver(DeltaReceiver):
    """One that only looks at the version, as a count of visits would do, not at the values."""

    def _follows(self, frame: Frame, entry: Entry | None) -> bool:
        if entry is None:
            return not frame.prefix.is_delta
        return frame.version > entry.version

    def _is_intact(self, frame: Frame, crc: int) -> bool:
        return True


class Boundary:
    """Two ends, a link that does what it likes, and a record of what was sent."""

    def __init__(self, seed: int, kind: Callable[..., DeltaReceiver] = DeltaReceiver) -> None:
        self.rng = random.Random(seed)
        self.kind = kind
        self.spec = SPECS[seed % len(SPECS)]
        self.generation = 0
        self.samples = torch.randn(
            NUM_SAMPLES, NUM_VALUES, generator=torch.Generator().manual_seed(seed)
        )
        self.sender, self.receiver = self.new_sender(), self.new_receiver()
        self.written: dict[bytes, Tensor] = {}
        """By frame: the values that the sender wrote down when it made it."""
        self.late: list[bytes] = []
        self.counts = dict.fromkeys(("accepted", "refused", "repeated", "foreign", "given up"), 0)

    @property
    def scope(self) -> bytes:
        return b"generation %d" % self.generation

    def cache(self) -> DeltaCache:
        return DeltaCache(NUM_SLOTS * 2 * NUM_VALUES, NUM_VALUES)

    def new_sender(self) -> DeltaSender:
        return DeltaSender(self.spec, self.scope, self.cache())

    def new_receiver(self) -> DeltaReceiver:
        return self.kind(self.spec, self.scope, self.cache())

    def prepare(self, sample: int) -> bytes:
        """The frame of a sample that has drifted a little since its last visit."""
        drift = torch.tensor([self.rng.gauss(0, 0.1) for _ in range(NUM_VALUES)])
        self.samples[sample] += drift
        frame = bytes(self.sender.prepare(b"%d" % sample, self.samples[sample]))
        slot = unpack_frame(frame, NUM_VALUES).prefix.slot
        is_kept = slot < NUM_SLOTS
        values = self.sender._cache.values(slot) if is_kept else self.samples[sample]
        self.written[frame] = values.to(torch.bfloat16).clone()
        return frame

    def deliver(self, frame: bytes) -> bytes | None:
        """One frame arrives; what the receiver answers. All claims are checked."""
        try:
            found = self.receiver.receive(frame)
        except CodecError:
            self.counts["foreign"] += 1
            return None
        if found.tensor is None:
            self.counts["refused"] += 1
        else:
            self.counts["repeated" if found.is_repeated else "accepted"] += 1
            assert torch.equal(found.tensor, self.written[frame].float()), (
                "computed on other values"
            )
        self.check()
        return found.refusal

    def check(self) -> None:
        """Where both ends hold the same entry, they hold the same bits.

        A sender that began anew in the same generation counts its versions again, so the same
        version alone may be another one; its checksum tells.
        """
        for slot in range(NUM_SLOTS):
            ours, theirs = self.sender._cache.entry(slot), self.receiver._cache.entry(slot)
            if ours is not None and ours == theirs:
                values = [end._cache.values(slot) for end in (self.sender, self.receiver)]
                assert torch.equal(*values), "same entry, other values"

    def exchange(self, sample: int, fault: float) -> bool:
        """Get one sample across, as an engine would; False if the step has to be given up."""
        frame = self.prepare(sample)
        for _ in range(8):
            if self.late and self.rng.random() < fault:
                self.deliver(self.late.pop(self.rng.randrange(len(self.late))))
            if self.rng.random() < fault:  # lost, or only late
                if self.rng.random() < 0.5:
                    self.late.append(frame)
                if self.rng.random() < 0.5:  # send the same bytes again, or make a new frame
                    frame = self.prepare(sample)
                continue
            if self.rng.random() < fault:
                self.late.append(frame)  # a copy of it comes later
            num_refused = self.counts["refused"]
            refusal = self.deliver(frame)
            if refusal is not None:
                if self.rng.random() < fault:
                    continue  # the answer is lost
                if self.sender.refused(refusal) is not None:
                    frame = self.prepare(sample)
                continue
            if self.counts["refused"] == num_refused and self.agree(frame):
                return True
        self.counts["given up"] += 1
        return False

    def agree(self, frame: bytes) -> bool:
        """Whether a frame went through; then both ends must hold the same in its slot."""
        found = unpack_frame(frame, NUM_VALUES)
        if found.prefix.scope != self.sender._scope or found.prefix.scope != self.receiver._scope:
            return False
        slot = found.prefix.slot
        if slot < NUM_SLOTS:
            ours, theirs = self.sender._cache.entry(slot), self.receiver._cache.entry(slot)
            assert ours == theirs, "an accepted frame left the ends with different entries"
            values = [end._cache.values(slot) for end in (self.sender, self.receiver)]
            assert torch.equal(*values), "an accepted frame left the ends with different values"
        return True

    def step(self, fault: float) -> None:
        batch = self.rng.sample(range(NUM_SAMPLES), BATCH)
        is_done = all(self.exchange(sample, fault) for sample in batch)
        outcomes = [is_done, is_done]
        for end in range(2):
            if self.rng.random() < fault / 3:  # it hears the opposite, or nothing
                outcomes[end] = not outcomes[end]
        for outcome, end in zip(outcomes, (self.sender, self.receiver), strict=True):
            end.commit() if outcome else end.rollback()
        self.check()
        if self.rng.random() < fault / 3:
            self.begin_anew()

    def begin_anew(self) -> None:
        """One process restarts in the same generation, or a new generation begins."""
        match self.rng.randrange(3):
            case 0:
                self.sender = self.new_sender()
            case 1:
                self.receiver = self.new_receiver()
            case 2:
                self.generation += 1
                self.sender.reset(self.scope)
                if self.late and self.rng.random() < 0.5:  # the receiver hears of it later
                    self.deliver(self.late.pop())
                self.receiver.reset(self.scope)

    def run(self, fault: float) -> None:
        for _ in range(NUM_STEPS):
            self.step(fault)


def heals(boundary: Boundary) -> None:
    """Without faults: at most one refusal for each sample, then changes only, all equal."""
    boundary.late.clear()
    for visits in range(3):
        before = dict(boundary.counts)
        num_deltas = boundary.sender.counts.num_deltas
        for sample in range(NUM_SAMPLES):
            assert boundary.exchange(sample, fault=0)
            boundary.sender.commit()
            boundary.receiver.commit()
            boundary.check()
        num_refused = boundary.counts["refused"] - before["refused"]
        assert num_refused <= (NUM_SLOTS if visits == 0 else 0)
        if visits:
            assert boundary.sender.counts.num_deltas == num_deltas + NUM_SLOTS
    for slot in range(NUM_SLOTS):
        caches = (boundary.sender._cache, boundary.receiver._cache)
        assert caches[0].entry(slot) == caches[1].entry(slot) is not None
        assert torch.equal(caches[0].values(slot), caches[1].values(slot))


def test_without_faults_nothing_is_refused() -> None:
    boundary = Boundary(seed=0)
    boundary.run(fault=0)
    assert boundary.counts["accepted"] == NUM_STEPS * BATCH
    assert sum(boundary.counts.values()) == NUM_STEPS * BATCH
    heals(boundary)


@pytest.mark.parametrize("seed", range(24))
def test_both_caches_stay_equal_and_heal(seed: int) -> None:
    boundary = Boundary(seed)
    boundary.run(fault=(0.1, 0.3, 0.5)[seed % 3])
    heals(boundary)


def test_the_faults_of_the_simulation_happen() -> None:
    total: dict[str, int] = {}
    for seed in range(6):
        boundary = Boundary(seed)
        boundary.run(fault=0.3)
        for name, count in boundary.counts.items():
            total[name] = total.get(name, 0) + count
    assert all(count > 3 for count in total.values()), total


@pytest.mark.parametrize("kind", [TrustingReceiver, ForgetfulReceiver])
def test_without_the_checks_the_simulation_finds_unequal_caches(
    kind: type[DeltaReceiver],
) -> None:
    num_broken = 0
    for seed in range(8):
        boundary = Boundary(seed, kind)
        try:
            boundary.run(fault=0.3)
            heals(boundary)
        except AssertionError:
            num_broken += 1
    assert num_broken >= 7


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", range(0, 2000, 100))
def test_2000_seeds_stay_equal_and_heal(first: int) -> None:
    for seed in range(1000 + first, 1100 + first):
        boundary = Boundary(seed)
        boundary.run(fault=(0.1, 0.3, 0.5)[seed % 3])
        heals(boundary)
