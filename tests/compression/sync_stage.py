"""A stage of four slots on a small problem, all in one process."""

from collections.abc import Sequence

import torch
from torch import Tensor

from swarmnode.compression.sync.inner import InnerAdamW
from swarmnode.compression.sync.layout import Layout, layout_of
from swarmnode.compression.sync.loopback import Traffic, step
from swarmnode.compression.sync.slot import SyncedSlot
from swarmnode.sync_specs import Sync

SHAPES = ((70,), (96, 100), (5, 7), (160, 64))
RATE = 0.01


class Stage:
    """Each slot pulls towards its own noisy view of one target."""

    def __init__(self, sync: Sync, num_slots: int = 4, seed: int = 0, device: str = "cpu") -> None:
        self.sync = sync
        self.layout: Layout = layout_of(SHAPES, sync, num_slots)
        num_values = self.layout.num_values
        generator = torch.Generator().manual_seed(seed)
        self.target_N = torch.randn(num_values, generator=generator).to(device)
        self.offsets_KN = 0.3 * torch.randn(num_slots, num_values, generator=generator)
        self.offsets_KN -= self.offsets_KN.mean(dim=0)
        self.offsets_KN = self.offsets_KN.to(device)
        self._generator = generator
        start_N = torch.zeros(num_values, device=device)
        self.slots = [
            SyncedSlot(
                sync, self.layout, slot, start_N.clone(), InnerAdamW(start_N, weight_decay=0)
            )
            for slot in range(num_slots)
        ]
        self.traffic = Traffic()

    def gradient(self, slot: SyncedSlot) -> Tensor:
        noise_N = 0.1 * torch.randn(self.layout.num_values, generator=self._generator)
        pull_N = slot.theta_N - self.target_N - self.offsets_KN[slot.slot]
        return pull_N + noise_N.to(pull_N.device)

    def gradients(self) -> list[Tensor]:
        return [self.gradient(slot) for slot in self.slots]

    def train(self, num_steps: int, *, is_last: bool = True) -> None:
        for index in range(num_steps):
            ends = is_last and index == num_steps - 1
            step(self.slots, self.gradients(), RATE, self.traffic, is_last=ends)

    def distance(self) -> float:
        """From the target, relative to that of the start."""
        mean_N = torch.stack([slot.common for slot in self.slots]).mean(dim=0)
        return float((mean_N - self.target_N).norm() / self.target_N.norm())


def all_equal(tensors: Sequence[Tensor]) -> bool:
    return all(torch.equal(tensors[0], each) for each in tensors[1:])
