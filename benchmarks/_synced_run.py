"""One row of the full convergence suite: slots of one stage train with one `Sync`, in turn.

Shape letters: K slots, B samples, S bytes, N parameters.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from _language import Corpus, LanguageModel, Size
from torch import Tensor

from swarmnode.codec_specs import SMALL_ELEMENTS
from swarmnode.compression.sync.inner import InnerAdamW
from swarmnode.compression.sync.layout import Layout, layout_of
from swarmnode.compression.sync.loopback import Traffic, step
from swarmnode.compression.sync.slot import SyncedSlot
from swarmnode.sync_specs import Sync

NUM_SLOTS = 4
WARMUP_STEPS = 100
COOLDOWN = 0.3
"""Share of the steps over which the learning rate falls to zero."""


@dataclass(frozen=True)
class Plan:
    """What all rows of a table have in common."""

    num_steps: int
    batch: int
    rate: float
    num_windows: int
    """Held out, for the last evaluation; an eighth of them on the way."""
    every: int = 200
    """Steps between evaluations."""
    size: Size = field(default_factory=Size)


@dataclass(frozen=True)
class Row:
    """What one method did with one seed. Losses are nats per byte, of what all slots have alike:
    the anchor, or the parameters, or without either the mean of theirs."""

    method: str
    sync: str
    seed: int
    plan: dict[str, object]
    num_parameters: int
    held_out: float
    held_out_by_file: dict[str, float]
    of_slot_0: float
    """The held-out loss of the first slot's own parameters."""
    curve: list[tuple[int, float]]
    """(step, held-out loss on an eighth of the windows)."""
    train_curve: list[tuple[int, float]]
    """(step, mean training loss of all slots over the steps since)."""
    up_bytes: float
    """A slot's mean."""
    down_bytes: float
    num_exchanges: int
    num_rejected: int
    compute_cpu_s: float
    """Forward and backward of all slots, one after the other, on one core. On a GPU this and the
    next one are what the processor has to do for it: no measure of speed."""
    sync_cpu_s: float
    """Inner steps, coding, opening and summing, of all slots."""
    wall_s: float
    """With evaluations, and whatever else the machine did."""

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def rate_at(plan: Plan, step_index: int) -> float:
    rest = (plan.num_steps - step_index) / (COOLDOWN * plan.num_steps)
    return plan.rate * min(1.0, (step_index + 1) / WARMUP_STEPS, rest)


class Run:
    """Four slots, one model that takes turns between them, where the corpus is."""

    def __init__(self, sync: Sync, corpus: Corpus, plan: Plan, seed: int) -> None:
        device = corpus.train.device
        self.model = LanguageModel(plan.size, seed).to(device)
        self.corpus, self.plan = corpus, plan
        shapes = [tuple(parameter.shape) for parameter in self.model.parameters()]
        self.layout: Layout = layout_of(shapes, sync, NUM_SLOTS)
        start_N = torch.empty(self.layout.num_values, device=device)
        for view, parameter in zip(
            self.layout.views(start_N), self.model.parameters(), strict=True
        ):
            view.copy_(parameter.data)
        num_large = sum(p.numel() for p in self.model.parameters() if p.numel() >= SMALL_ELEMENTS)
        self.slots = [
            SyncedSlot(
                sync,
                self.layout,
                slot,
                start_N.clone(),
                InnerAdamW(start_N, num_decayed=num_large),
            )
            for slot in range(NUM_SLOTS)
        ]
        self.starts = corpus.batches(seed, plan.num_steps, NUM_SLOTS, plan.batch)
        self.traffic = Traffic()
        self.compute_cpu_s = self.sync_cpu_s = 0.0

    def step(self, index: int) -> float:
        """The mean training loss of all slots."""
        began_s, losses, gradients = time.process_time(), [], []
        for slot in self.slots:
            loss, gradient_N = self._gradient(slot, index)
            losses.append(loss)
            gradients.append(gradient_N)
        computed_s = time.process_time()
        is_last = index == self.plan.num_steps - 1
        step(self.slots, gradients, rate_at(self.plan, index), self.traffic, is_last=is_last)
        self.compute_cpu_s += computed_s - began_s
        self.sync_cpu_s += time.process_time() - computed_s
        return sum(losses) / len(losses)

    def _gradient(self, slot: SyncedSlot, index: int) -> tuple[float, Tensor]:
        self.model.use(self.layout.views(slot.theta_N))
        self.model.zero_grad(set_to_none=True)
        loss = self.model.loss(self.corpus.windows(self.starts[index, slot.slot]))
        loss.backward()
        gradient_N = torch.empty_like(slot.theta_N)
        views = self.layout.views(gradient_N)
        for view, parameter in zip(views, self.model.parameters(), strict=True):
            assert parameter.grad is not None
            view.copy_(parameter.grad)
        return float(loss.detach()), gradient_N

    def held_out(self, vector_N: Tensor, stride: int) -> dict[str, float]:
        self.model.use(self.layout.views(vector_N))
        return {
            name: self.model.held_out_loss(windows_BS[::stride])
            for name, windows_BS in self.corpus.held_out.items()
        }

    def common(self) -> Tensor:
        if self.slots[0].sync.sends == "weights":
            return torch.stack([slot.theta_N for slot in self.slots]).mean(dim=0)
        return self.slots[0].common


def run(
    method: str,
    sync: Sync,
    corpus: Corpus,
    plan: Plan,
    seed: int,
    report: Callable[[str], None],
) -> Row:
    """Train from the seed's start on its data, whatever the method."""
    it = Run(sync, corpus, plan, seed)
    curve: list[tuple[int, float]] = []
    train_curve: list[tuple[int, float]] = []
    recent: list[float] = []
    began_s = time.perf_counter()
    for index in range(plan.num_steps):
        if index % plan.every == 0:
            curve.append((index, _mean(it.held_out(it.common(), 8))))
        recent.append(it.step(index))
        if (index + 1) % 20 == 0 or index == plan.num_steps - 1:
            train_curve.append((index + 1, sum(recent) / len(recent)))
            recent.clear()
            passed_s = time.perf_counter() - began_s
            left_s = passed_s / (index + 1) * (plan.num_steps - index - 1)
            report(
                f"{method} seed {seed}: step {index + 1}/{plan.num_steps}, "
                f"loss {train_curve[-1][1]:.3f}, {left_s:.0f} s left"
            )
    by_file = it.held_out(it.common(), 1)
    curve.append((plan.num_steps, _mean(it.held_out(it.common(), 8))))
    return Row(
        method,
        str(sync),
        seed,
        asdict(plan),
        it.layout.num_values,
        _mean(by_file),
        by_file,
        _mean(it.held_out(it.slots[0].theta_N, 1)),
        curve,
        train_curve,
        sum(it.traffic.up_bytes.values()) / NUM_SLOTS,
        sum(it.traffic.down_bytes.values()) / NUM_SLOTS,
        it.traffic.num_exchanges,
        sum(slot.num_rejected for slot in it.slots),
        it.compute_cpu_s,
        it.sync_cpu_s,
        time.perf_counter() - began_s,
    )


def _mean(losses: dict[str, float]) -> float:
    return sum(losses.values()) / len(losses)


def progress() -> Callable[[str], None]:
    """A line that is written over on a terminal; elsewhere one a minute."""
    if sys.stderr.isatty():
        return lambda line: print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
    last_s = [-1e9]

    def say(line: str) -> None:
        if time.monotonic() - last_s[0] >= 60:
            last_s[0] = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    return say
