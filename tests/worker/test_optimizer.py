"""The stage optimizer: AdamW as torch computes it, decay on matrices only, restartable."""

import pytest
import torch
from torch.nn import Parameter

from swarmnode.errors import DataError
from swarmnode.manifest import OptimizerConfig
from swarmnode.worker.training.optimizer import StageOptimizer

CONFIG = OptimizerConfig(learning_rate=0.1, warmup_steps=2, weight_decay=0.5)


def parameters() -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": Parameter(torch.randn(3, 4, generator=generator)),
        "a.bias": Parameter(torch.randn(4, generator=generator)),
    }


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in parameters().items()}


def test_it_computes_adamw_with_the_rate_of_the_step() -> None:
    ours, values = parameters(), {n: p.detach().double() for n, p in parameters().items()}
    optimizer = StageOptimizer(ours, CONFIG)
    first = {n: torch.zeros_like(v) for n, v in values.items()}
    second = {n: torch.zeros_like(v) for n, v in values.items()}
    for step in range(5):
        optimizer.apply(gradients(step), step=step, num_steps=5)
        rate = CONFIG.learning_rate_at(step, 5)
        for name, gradient in gradients(step).items():
            g = gradient.double()
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g * g
            decay = 0.5 if values[name].ndim >= 2 else 0.0
            unbiased = first[name] / (1 - 0.9 ** (step + 1))
            root = (second[name] / (1 - 0.95 ** (step + 1))).sqrt() + CONFIG.epsilon
            values[name] = values[name] * (1 - rate * decay) - rate * unbiased / root
    for name, value in values.items():
        torch.testing.assert_close(ours[name].detach().double(), value, rtol=0, atol=1e-5)
    assert all(p.grad is None for p in ours.values())


def test_a_restart_from_moments_goes_on_bit_for_bit() -> None:
    whole, halves = parameters(), parameters()
    optimizer = StageOptimizer(whole, CONFIG)
    for step in range(6):
        optimizer.apply(gradients(step), step=step, num_steps=6)
    before = StageOptimizer(halves, CONFIG)
    for step in range(3):
        before.apply(gradients(step), step=step, num_steps=6)
    after = StageOptimizer(halves, CONFIG)
    after.set_state(3, {name: moment.clone() for name, moment in before.moments().items()})
    for step in range(3, 6):
        after.apply(gradients(step), step=step, num_steps=6)
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert set(after.moments()) == {
        "a.bias::exp_avg", "a.bias::exp_avg_sq", "b.weight::exp_avg", "b.weight::exp_avg_sq"
    }  # fmt: skip


def test_absent_moments_are_zero_and_misshapen_ones_are_refused() -> None:
    optimizer = StageOptimizer(parameters(), CONFIG)
    optimizer.apply(gradients(0), step=0, num_steps=5)
    assert all(bool(m.any()) for m in optimizer.moments().values())
    optimizer.set_state(4, {})
    assert not any(bool(m.any()) for m in optimizer.moments().values())
    with pytest.raises(DataError, match="exp_avg"):
        optimizer.set_state(4, {"a.bias::exp_avg": torch.zeros(5)})
    with pytest.raises(DataError, match="float64"):
        optimizer.set_state(4, {"a.bias::exp_avg": torch.zeros(4, dtype=torch.float64)})
