"""Error feedback: nothing is lost but what is still owed, and a failed exchange never happened."""

import pytest
import torch
from torch import Tensor

from swarmnode.compression.codec import get_codec
from swarmnode.compression.feedback import ErrorFeedback
from swarmnode.errors import CodecError


def gradients(count: int, seed: int, num_values: int = 5000) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(num_values, generator=generator)
    return [mean + torch.randn(num_values, generator=generator) for _ in range(count)]


def exchange(feedback: ErrorFeedback, spec: str, tensor: Tensor, step: int) -> Tensor:
    codec = get_codec(spec).at(step)
    pending = feedback.prepare(tensor, step)
    sent = codec.decode(codec.encode(pending.tensor), tensor.shape)
    feedback.commit(pending, sent)
    return sent


@pytest.mark.parametrize(
    "spec",
    ["int4/32", "int2/32", "topk64of4096/int4", "stride0.1/int4", "cocktail/p0.1/k0.2/int4"],
)
def test_all_that_was_sent_is_all_that_came_in_but_the_residual(spec: str) -> None:
    feedback, total, received = ErrorFeedback(), torch.zeros(5000), torch.zeros(5000)
    for step, gradient in enumerate(gradients(50, seed=1)):
        total += gradient
        received += exchange(feedback, spec, gradient, step)
    assert feedback.residual is not None
    scale = float(total.abs().max())
    assert (received + feedback.residual - total).abs().max() <= 1e-5 * scale
    assert (received - total).abs().max() > 1e-3 * scale, "the residual must matter"


def test_with_feedback_a_coarse_codec_follows_the_mean_and_without_it_does_not() -> None:
    spec, steps = "topk64of4096/int4", 400
    constant = gradients(1, seed=2)[0]
    feedback, with_it, without = ErrorFeedback(), torch.zeros(5000), torch.zeros(5000)
    codec = get_codec(spec)
    for step in range(steps):
        with_it += exchange(feedback, spec, constant, step)
        without += codec.decode(codec.encode(constant), constant.shape)
    size = float(constant.square().sum().sqrt())
    assert float((with_it / steps - constant).square().sum().sqrt()) < 0.25 * size
    assert float((without / steps - constant).square().sum().sqrt()) > 0.9 * size


@pytest.mark.parametrize("spec", ["int4/32", "int3/32", "int2/16"])
def test_the_residual_of_a_contraction_stays_bounded(spec: str) -> None:
    delta = get_codec(spec).energy_bound
    feedback, largest = ErrorFeedback(), 0.0
    for step, gradient in enumerate(gradients(60, seed=3)):
        largest = max(largest, float(gradient.square().sum().sqrt()))
        exchange(feedback, spec, gradient, step)
        assert feedback.residual is not None
        owed = float(feedback.residual.square().sum().sqrt())
        assert owed <= delta**0.5 / (1 - delta**0.5) * largest
    assert owed > 0


def test_a_rolled_back_exchange_leaves_the_residual_bit_for_bit() -> None:
    feedback, control = ErrorFeedback(), ErrorFeedback()
    first, lost, second = gradients(3, seed=4)
    for each in (feedback, control):
        exchange(each, "int4/32", first, 0)
    assert feedback.residual is not None
    before = feedback.residual.clone()
    pending = feedback.prepare(lost, 1)
    pending.tensor.mul_(7)  # whatever happens to what was handed out
    feedback.rollback(pending)
    assert torch.equal(feedback.residual, before)
    sent = [exchange(each, "int4/32", second, 2) for each in (feedback, control)]
    assert torch.equal(sent[0], sent[1])


def test_an_input_that_cannot_be_coded_can_be_rolled_back() -> None:
    feedback = ErrorFeedback()
    exchange(feedback, "int4/32", torch.ones(40) / 3, 0)
    before = feedback.residual
    pending = feedback.prepare(torch.full((40,), torch.nan), 1)
    with pytest.raises(CodecError):
        get_codec("int4/32").encode(pending.tensor)
    feedback.rollback(pending)
    assert feedback.residual is before


def test_workers_and_the_owner_of_a_sum_both_feed_back() -> None:
    """Two coded hops, each with its own residual: what is received and owed adds up."""
    spec, num_workers = "cocktail/p0.1/k0.2/int4", 3
    workers = [ErrorFeedback() for _ in range(num_workers)]
    server = ErrorFeedback()
    inputs = [gradients(30, seed=10 + worker) for worker in range(num_workers)]
    total, received = torch.zeros(5000), torch.zeros(5000)
    for step in range(30):
        pushed = torch.zeros(5000)
        for feedback, stream in zip(workers, inputs, strict=True):
            total += stream[step]
            pushed += exchange(feedback, spec, stream[step], step)
        received += exchange(server, spec, pushed, step)
    owed = sum((each.residual for each in workers), torch.zeros(5000))  # type: ignore[misc]
    assert server.residual is not None
    difference = received + owed + server.residual - total
    assert difference.abs().max() <= 1e-5 * float(total.abs().max())


def test_absence_decays_and_then_drops_the_residual() -> None:
    zero = torch.zeros(64)
    feedback = ErrorFeedback(decay=0.5, max_absence=4)
    exchange(feedback, "int2/32", torch.linspace(0, 1, 64), 10)
    assert feedback.residual is not None
    owed = feedback.residual.clone()
    pending = feedback.prepare(zero, 13)
    assert torch.equal(pending.tensor, owed * 0.125)
    feedback.rollback(pending)
    feedback.rollback(feedback.prepare(zero, 14))
    assert feedback.num_dropped == 0
    pending = feedback.prepare(zero, 15)
    assert torch.equal(pending.tensor, zero)
    feedback.rollback(pending)
    assert torch.equal(feedback.residual, owed)
    exchange(feedback, "int2/32", zero, 15)
    assert feedback.num_dropped == 1


@pytest.mark.parametrize("step", [9, 10])
def test_a_step_that_is_done_again_does_not_see_what_it_left(step: int) -> None:
    feedback, zero = ErrorFeedback(), torch.zeros(64)
    exchange(feedback, "int2/32", torch.linspace(0, 1, 64), 10)
    pending = feedback.prepare(zero, step)
    assert torch.equal(pending.tensor, zero)
    feedback.commit(pending, zero)
    assert feedback.num_dropped == 1
    assert feedback.step == step


def test_what_is_not_finite_or_of_another_shape_is_never_owed() -> None:
    feedback = ErrorFeedback()
    pending = feedback.prepare(torch.tensor([1.0, torch.inf]), 0)
    feedback.commit(pending, torch.zeros(2))
    assert feedback.residual is None
    assert feedback.num_dropped == 1
    exchange(feedback, "int2/32", torch.linspace(0, 1, 64), 1)
    pending = feedback.prepare(torch.ones(3), 2)
    assert torch.equal(pending.tensor, torch.ones(3))
    feedback.commit(pending, torch.ones(3))
    assert feedback.num_dropped == 2


def test_exchanges_do_not_overlap() -> None:
    feedback = ErrorFeedback()
    pending = feedback.prepare(torch.ones(3), 0)
    with pytest.raises(AssertionError):
        feedback.prepare(torch.ones(3), 1)
    feedback.rollback(pending)
    with pytest.raises(AssertionError):
        feedback.commit(pending, torch.ones(3))
