"""The byte-level GPT of the full convergence suite: 3 layers of 192, 1.4 M parameters.

Shape letters: B samples, S bytes of context, D hidden values, N parameters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONTEXT = 64
HELD_OUT_SHARE = 0.1
"""Of each file, from its end."""


@dataclass(frozen=True)
class Size:
    """Of the model."""

    dim: int = 192
    num_layers: int = 3
    num_heads: int = 4


class Layer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        dim = size.dim
        self.num_heads = size.num_heads
        self.norms = nn.ModuleList([nn.LayerNorm(dim, bias=False) for _ in range(2)])
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        num_samples, length, _ = x_BSD.shape
        qkv = self.qkv(self.norms[0](x_BSD)).view(num_samples, length, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BSD = x_BSD + self.out(mixed.transpose(1, 2).reshape(x_BSD.shape))
        return x_BSD + self.down(F.gelu(self.up(self.norms[1](x_BSD))))


class LanguageModel(nn.Module):
    """The head shares the embedding. All slots use one: their parameters are put in for a turn."""

    def __init__(self, size: Size, seed: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, size.dim)
        self.positions = nn.Embedding(CONTEXT, size.dim)
        self.layers = nn.ModuleList([Layer(size) for _ in range(size.num_layers)])
        self.norm = nn.LayerNorm(size.dim, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
        for layer in self.layers:
            for linear in (layer.out, layer.down):
                with torch.no_grad():
                    linear.weight /= math.sqrt(2 * size.num_layers)

    def loss(self, text_BS: Tensor) -> Tensor:
        """Mean nats per byte of windows of CONTEXT + 1 bytes."""
        hidden_BSD = self.embedding(text_BS[:, :-1]) + self.positions.weight
        for layer in self.layers:
            hidden_BSD = layer(hidden_BSD)
        logits = self.norm(hidden_BSD) @ self.embedding.weight.t()
        return F.cross_entropy(logits.flatten(0, 1), text_BS[:, 1:].flatten())

    def use(self, views: Sequence[Tensor]) -> None:
        """Compute on these parameters from now on."""
        for parameter, view in zip(self.parameters(), views, strict=True):
            parameter.data = view

    @torch.no_grad()
    def held_out_loss(self, windows_BS: Tensor) -> float:
        parts = windows_BS.split(64)
        return sum(float(self.loss(part)) * len(part) for part in parts) / len(windows_BS)


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on, and windows held out of each file."""

    train: Tensor
    held_out: dict[str, Tensor]

    @staticmethod
    def of(paths: Sequence[Path], num_windows: int) -> "Corpus":
        """The last tenth of each file is held out: evenly spaced windows, alike for all seeds."""
        parts, held_out = [], {}
        for path in paths:
            data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
            split = int(len(data) * (1 - HELD_OUT_SHARE))
            parts.append(data[:split])
            starts = torch.linspace(split, len(data) - CONTEXT - 1, num_windows).long()
            name = f"{path.parent.name}/{path.name}"
            held_out[name] = _windows(data, starts)
        return Corpus(torch.cat(parts), held_out)

    def to(self, device: str) -> "Corpus":
        held_out = {name: windows_BS.to(device) for name, windows_BS in self.held_out.items()}
        return Corpus(self.train.to(device), held_out)

    def batches(self, seed: int, num_steps: int, num_slots: int, batch: int) -> Tensor:
        """Where every window starts: steps x slots x samples. The seed alone decides."""
        generator = torch.Generator().manual_seed(1000 + seed)
        last = len(self.train) - CONTEXT
        return torch.randint(last, (num_steps, num_slots, batch), generator=generator)

    def windows(self, starts_B: Tensor) -> Tensor:
        return _windows(self.train, starts_B)


def _windows(data: Tensor, starts_B: Tensor) -> Tensor:
    return data[(starts_B.unsqueeze(1) + torch.arange(CONTEXT + 1)).to(data.device)]
