"""Slots that train with a `Sync`: they stay together, lose nothing, and can take a step back."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from swarmnode.compression.sync.averaging import Averager
from swarmnode.compression.sync.inner import InnerAdamW
from swarmnode.compression.sync.layout import layout_of
from swarmnode.compression.sync.loopback import exchange, step
from swarmnode.compression.sync.messages import HEADER_BYTES, PUSH, REPLY
from swarmnode.compression.sync.neighbours import NeighbourSync
from swarmnode.compression.sync.outer import DifferenceSync
from swarmnode.sync_specs import SYNC_PRESETS, Outer, Sync, parse_sync
from tests.compression.sync_stage import RATE, SHAPES, Stage, all_equal

LOOSE = {"decentralised", "lowprecision"}
"""Those that never make slots equal."""
LATE = {"cocktail", "streaming"}
"""Those whose slots differ, around an anchor that does not."""
NUM_SMALL, NUM_LARGE = 70 + 35, 96 * 100 + 160 * 64


def sync_of(name: str) -> Sync:
    """The preset, with rounds that fit a short test."""
    sync = SYNC_PRESETS[name]
    return replace(sync, every=6) if sync.every == 30 else replace(sync, warmup=min(sync.warmup, 5))


def state(stage: Stage) -> list[Tensor]:
    """All that lasts of all slots."""
    found: list[Tensor] = []
    for slot in stage.slots:
        inner, ex = slot.inner, slot.exchange
        found += [slot.theta_N, slot.common, inner.momentum_N, inner.variance_N]
        if isinstance(ex, NeighbourSync):
            found += [ex.mirrors[each] for each in sorted(ex.mirrors)]
            continue
        found += [ex.averager.residual(PUSH), ex.averager.residual(REPLY)]
        if isinstance(ex, DifferenceSync):
            found += [ex._late_N, ex._outer.momentum_N]
    return [each.clone() for each in found]


@pytest.mark.parametrize("name", sorted(SYNC_PRESETS))
def test_every_preset_learns_and_its_slots_stay_together(name: str) -> None:
    stage = Stage(sync_of(name))
    stage.train(12, is_last=False)
    before = stage.distance()
    stage.train(12)
    assert stage.distance() < before < 1
    common = [slot.common for slot in stage.slots]
    assert all_equal(common) == (name not in LOOSE)
    assert all_equal([slot.theta_N for slot in stage.slots]) == (name not in LOOSE | LATE)
    assert all(slot.num_rejected == 0 for slot in stage.slots)


@pytest.mark.parametrize("name", sorted(SYNC_PRESETS))
def test_the_same_seed_gives_the_same_bits(name: str) -> None:
    stages = [Stage(sync_of(name)) for _ in range(2)]
    for stage in stages:
        stage.train(7)
    assert all(torch.equal(a, b) for a, b in zip(*map(state, stages), strict=True))
    assert stages[0].traffic == stages[1].traffic


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", sorted(SYNC_PRESETS))
def test_slots_on_a_gpu_train_as_on_a_cpu(name: str) -> None:
    """As near as sums allow: one that rounds otherwise may change what is selected."""
    on_cpu, on_gpu = Stage(sync_of(name)), Stage(sync_of(name), device="cuda")
    for stage in (on_cpu, on_gpu):
        stage.train(30)
    assert {each.device.type for each in state(on_gpu)} == {"cuda"}
    assert on_gpu.traffic == on_cpu.traffic
    assert on_gpu.distance() == pytest.approx(on_cpu.distance(), rel=0.05)


@pytest.mark.parametrize("name", sorted(SYNC_PRESETS))
def test_an_exchange_that_is_rolled_back_leaves_every_bit(name: str) -> None:
    """And what is done again afterwards is what would have been done at once."""
    stage = Stage(sync_of(name))
    steps = 6 + stage.sync.gap - 1
    stage.train(steps, is_last=False)
    gradients = stage.gradients()
    for slot, gradient_N in zip(stage.slots, gradients, strict=True):
        if slot.is_exchanging:
            slot.commit(RATE)
        slot.learn(gradient_N, RATE)
    control = copy.deepcopy(stage)
    before = state(stage)
    exchange(stage.slots, stage.traffic)
    for slot in stage.slots:
        slot.rollback()
    assert all(torch.equal(a, b) for a, b in zip(before, state(stage), strict=True))
    for each in (stage, control):
        exchange(each.slots, each.traffic)
        for slot in each.slots:
            slot.commit(RATE)
    after = state(stage)
    assert all(torch.equal(a, b) for a, b in zip(after, state(control), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_differences_of_one_step_in_full_are_plain_sgd_averaging() -> None:
    """every=1, codec none, outer sgd 1: the mean of the slots' own steps."""
    sync = parse_sync("diloco,every=1,outer=sgd1")
    stage = Stage(sync)
    for _ in range(10):
        starts = [slot.theta_N.clone() for slot in stage.slots]
        inners = [copy.deepcopy(slot.inner) for slot in stage.slots]
        gradients = stage.gradients()
        step(stage.slots, gradients, RATE, stage.traffic)
        alone = []
        for inner, start_N, gradient_N in zip(inners, starts, gradients, strict=True):
            inner.step(start_N, gradient_N, RATE)
            alone.append(start_N)
        torch.testing.assert_close(
            stage.slots[0].theta_N, torch.stack(alone).mean(dim=0), rtol=0, atol=1e-6
        )


def test_gradients_in_full_are_training_on_the_mean_gradient() -> None:
    stage = Stage(Sync(codec="none"))
    theta_N = torch.zeros(stage.layout.num_values)
    inner = InnerAdamW(theta_N, weight_decay=0)
    for _ in range(20):
        gradients = stage.gradients()
        step(stage.slots, gradients, RATE, stage.traffic)
        inner.step(theta_N, torch.stack(gradients).mean(dim=0), RATE)
    torch.testing.assert_close(stage.slots[0].theta_N, theta_N, rtol=0, atol=1e-6)


def test_gradients_a_step_late_are_those_of_the_step_before() -> None:
    stage = Stage(Sync(codec="none", staleness=1))
    theta_N = torch.zeros(stage.layout.num_values)
    inner = InnerAdamW(theta_N, weight_decay=0)
    late: Tensor | None = None
    for _ in range(10):
        gradients = stage.gradients()
        step(stage.slots, gradients, RATE, stage.traffic)
        if late is not None:
            inner.step(theta_N, late, RATE)
        late = torch.stack(gradients).mean(dim=0)
        torch.testing.assert_close(stage.slots[0].theta_N, theta_N, rtol=0, atol=1e-6)


@pytest.mark.parametrize("topology", ["owners", "everyone"])
def test_all_that_was_sent_is_all_that_came_in_but_what_is_owed(topology: str) -> None:
    """With feedback on both sides: K x the means + residuals of slots and owners = the inputs."""
    sync = parse_sync(f"sparseloco,decay=1,topology={topology},codec=topk64of4096/int4")
    layout = layout_of(SHAPES, sync, 3)
    averagers = [Averager(sync, layout, slot) for slot in range(3)]
    generator = torch.Generator().manual_seed(3)
    num_values = layout.num_values
    inputs_N, sums_N = torch.zeros(num_values), torch.zeros(num_values)
    for _ in range(12):
        values = [torch.randn(num_values, generator=generator) for _ in range(3)]
        inputs_N += sum(values, torch.zeros(num_values))
        means = run_exchange(averagers, values)
        for part, mean in means[0].items():
            sums_N[part.start : part.stop] += 3 * mean
        for averager in averagers:
            averager.commit()
    owed_N = sum((a.residual(PUSH) + 3 * a.residual(REPLY) for a in averagers), torch.zeros(1))
    assert (sums_N - inputs_N).abs().max() > 1, "what is owed matters"
    torch.testing.assert_close(sums_N + owed_N, inputs_N, rtol=0, atol=2e-4)


def run_exchange(averagers: list[Averager], values: list[Tensor]) -> list[dict]:  # type: ignore[type-arg]
    """Up to the commit; the means that each has."""
    pushes = {a.slot: a.prepare(v) for a, v in zip(averagers, values, strict=True)}

    def to(slot: int, messages: dict[int, dict[int, bytes]]) -> dict[int, bytes]:
        return {sender: each[slot] for sender, each in messages.items() if slot in each}

    replies = {a.slot: a.reduce(to(a.slot, pushes)) for a in averagers}
    has_owners = averagers[0].sync.topology == "owners"
    found = [a.receive(to(a.slot, replies if has_owners else pushes)) for a in averagers]
    for mean in found[1:]:
        assert all(torch.equal(mean[part], found[0][part]) for part in mean)
    return found


def test_late_differences_are_each_applied_once() -> None:
    """CO2 with an outer step of 1 and no momentum: in the end nothing of any round is missing."""
    sync = parse_sync("co2,every=2,codec=none,outer=sgd1")
    layout = layout_of(SHAPES, sync, 2)
    starts = [torch.zeros(layout.num_values) for _ in range(2)]
    slots = [DifferenceSync(sync, layout, slot, theta) for slot, theta in enumerate(starts)]
    learned_N = torch.zeros(layout.num_values)
    generator = torch.Generator().manual_seed(5)
    for index in range(6):
        for slot, theta_N in zip(slots, starts, strict=True):
            if index < 5:
                move_N = torch.randn(layout.num_values, generator=generator)
                theta_N += move_N
                learned_N += move_N / 2
            if index:
                slot.commit(theta_N)
        pushes = {
            slot.averager.slot: slot.prepare(t) for slot, t in zip(slots, starts, strict=True)
        }
        replies = {i: slots[i].reduce({1 - i: pushes[1 - i][i]}) for i in range(2)}
        for i in range(2):
            slots[i].receive({1 - i: replies[1 - i][i]})
    for slot, theta_N in zip(slots, starts, strict=True):
        slot.commit(theta_N)
        torch.testing.assert_close(slot.anchor_N, learned_N, rtol=0, atol=1e-5)
        assert torch.equal(slot.anchor_N, theta_N)


def test_outer_steps_are_those_of_torch() -> None:
    sync = parse_sync("diloco,every=1,outer=nesterov0.7/0.9")
    stage = Stage(sync)
    theta_N = torch.nn.Parameter(torch.zeros(stage.layout.num_values))
    outer = torch.optim.SGD([theta_N], lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(8):
        anchor_N, inners = stage.slots[0].common.clone(), copy.deepcopy(stage.slots)
        gradients = stage.gradients()
        for slot, gradient_N in zip(inners, gradients, strict=True):
            slot.inner.step(slot.theta_N, gradient_N, RATE)
        step(stage.slots, gradients, RATE, stage.traffic)
        theta_N.grad = torch.stack([anchor_N - slot.theta_N for slot in inners]).mean(dim=0)
        outer.step()
        torch.testing.assert_close(stage.slots[0].common, theta_N.detach(), rtol=0, atol=1e-5)


def test_a_clipped_outer_momentum_is_not_longer_than_allowed() -> None:
    sync = replace(
        sync_of("co2"), every=1, staleness=0, outer=Outer(1, 0.9, clip=1.0), codec="none"
    )
    stage = Stage(sync)
    for _ in range(6):
        anchor_N = stage.slots[0].common.clone()
        inners = copy.deepcopy(stage.slots)
        gradients = stage.gradients()
        for slot, gradient_N in zip(inners, gradients, strict=True):
            slot.inner.step(slot.theta_N, gradient_N, RATE)
        mean_N = torch.stack([anchor_N - slot.theta_N for slot in inners]).mean(dim=0)
        step(stage.slots, gradients, RATE, stage.traffic)
        assert (stage.slots[0].common - anchor_N).norm() <= 1.0001 * mean_N.norm()


def test_mirrors_of_neighbours_are_what_the_neighbours_know_of_themselves() -> None:
    stage = Stage(sync_of("lowprecision"))
    stage.train(9)
    for slot in stage.slots:
        assert isinstance(slot.exchange, NeighbourSync)
        assert len(slot.exchange.mirrors) == 3
        for other, mirror_N in slot.exchange.mirrors.items():
            assert torch.equal(mirror_N, stage.slots[other].theta_N)


def test_neighbours_in_full_have_the_mean_of_three() -> None:
    stage = Stage(sync_of("decentralised"), num_slots=5)
    for slot in stage.slots:
        slot.learn(stage.gradient(slot), RATE)
    before = [slot.theta_N.clone() for slot in stage.slots]
    exchange(stage.slots, stage.traffic)
    for slot in stage.slots:
        slot.commit(RATE)
        i = slot.slot
        mean_N = (before[i - 1] + before[i] + before[(i + 1) % 5]) / 3
        torch.testing.assert_close(slot.theta_N, mean_N, rtol=0, atol=1e-6)


BITS = {
    "allreduce": (16, 16),
    "bytegrad": (8.125, 8.125),
    "cocktail": (0.1825, 0.1825),
    "diloco": (32, 32),
}


@pytest.mark.parametrize("name", sorted(BITS))
def test_owners_send_two_times_k_minus_one_over_k_of_a_vector(name: str) -> None:
    """To within the last blocks and bitmap bytes of shards; small tensors as bf16 or better."""
    stage = Stage(replace(sync_of(name), every=1))
    stage.train(1)
    up, down = BITS[name]
    small = max(16, up) if name != "bytegrad" else 8
    bits = (NUM_LARGE * (up + down) + NUM_SMALL * 2 * small) * 3  # of K - 1 slots, over K of them
    num_bytes = sum(stage.traffic.up_bytes.values())
    exchanges = 1
    slack = exchanges * 24 * (HEADER_BYTES + 20)
    assert 0 <= num_bytes - exchanges * bits / 8 <= slack
    assert sum(stage.traffic.down_bytes.values()) == num_bytes


def test_everyone_sends_all_to_all_others() -> None:
    stage = Stage(replace(sync_of("sparseloco"), every=1))
    stage.train(1)
    whole, rest = divmod(NUM_LARGE, 4096)
    num_kept = 64 * whole + -(-rest * 64 // 4096)
    index, values = -(-num_kept * 12 // 8), -(-num_kept * 2 // 8) + 2 * -(-num_kept // 128)
    message = HEADER_BYTES + index + values + 2 * NUM_SMALL
    assert stage.traffic.up_bytes == dict.fromkeys(range(4), 3 * message)


def test_a_low_rank_exchange_codes_matrices() -> None:
    stage = Stage(replace(sync_of("powersgd"), warmup=0))
    stage.train(1)
    factors = 2 * 8 * (96 + 100 + 160 + 64)
    per_direction = 3 * (factors + 2 * NUM_SMALL)
    num_bytes = sum(stage.traffic.up_bytes.values())
    assert 0 <= num_bytes - 2 * per_direction <= 24 * HEADER_BYTES


def test_fragments_take_turns_and_cover_everything() -> None:
    sync = replace(sync_of("streaming"), every=6)
    layout = layout_of(SHAPES, sync, 4)
    covered = sorted((p.start, p.stop) for f in range(3) for p in layout.parts_of(f))
    assert covered[0][0] == 0
    assert covered[-1][1] == layout.num_values
    assert all(a[1] == b[0] for a, b in pairwise(covered))
    stage = Stage(sync)
    stage.train(6, is_last=False)
    assert stage.traffic.num_exchanges == 3


@pytest.mark.parametrize("num_fragments", [1, 5, 10])
def test_a_stride_reaches_every_value_of_every_fragment(num_fragments: int) -> None:
    """A tenth in each exchange of a fragment: after ten of them, each value has gone once."""
    sync = parse_sync(f"cocktail,every=10,codec=stride0.1/none,fragments={num_fragments}")
    layout = layout_of([(10 * 4096,)], sync, 2)
    averagers = [Averager(sync, layout, slot) for slot in range(2)]
    values = [torch.ones(layout.num_values)] * 2
    sent_N = torch.zeros(layout.num_values)
    for _ in range(10 * num_fragments):
        run_exchange(averagers, values)
        for part, each in averagers[0].sent().items():
            sent_N[part.start : part.stop] += each
        for averager in averagers:
            averager.commit()
    assert torch.equal(sent_N, torch.ones(layout.num_values))


@pytest.mark.parametrize("topology", ["owners", "everyone"])
def test_a_fragment_without_any_value_is_exchanged_as_nothing(topology: str) -> None:
    sync = parse_sync(f"sends=difference,every=3,fragments=3,topology={topology}")
    layout = layout_of([(64,)], sync, 2)
    averagers = [Averager(sync, layout, slot) for slot in range(2)]
    sizes = []
    for _ in range(3):
        (mean, _) = run_exchange(averagers, [torch.ones(layout.num_values)] * 2)
        sizes.append(sum(part.size for part in mean))
        for averager in averagers:
            averager.commit()
    assert sum(sizes) == 64
    assert 0 in sizes
