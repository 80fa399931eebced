"""A small byte-level GPT whose boundaries pass through real codecs: what compression costs a loss.

Shape letters: B samples, S bytes of context, D hidden values, H heads.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swarmnode.compression.codec import Codec, get_codec
from swarmnode.compression.delta import DeltaReceiver, DeltaSender
from swarmnode.compression.delta_cache import DeltaCache

DIM, NUM_LAYERS, NUM_HEADS, CONTEXT, BATCH = 64, 4, 4, 48, 16
NUM_CUTS = NUM_LAYERS - 1
LEARNING_RATE, WARMUP_STEPS = 6e-3, 15
COOLDOWN = 0.3
"""Share of the steps over which the learning rate falls to zero."""
NUM_VALIDATION = 1024
"""Windows held out."""


@dataclass(frozen=True)
class Method:
    """What a boundary does: a codec forward, one backward; without names it is none."""

    name: str
    forward: str = ""
    backward: str = ""


@dataclass(frozen=True)
class Result:
    """Losses in nats per byte."""

    train: float
    """Mean of the last tenth of the steps."""
    validation: float
    """With the boundaries as in training; `aq` sees each sample for the first time, so in full."""
    forward_bits: float
    """Sent forward for each value, headers included only for `aq`."""


class Boundary:
    """One cut point: activations are coded forward, their gradients backward.

    Without a memory a batch is one tensor. `aq` codes sample by sample, by both ends' real frames,
    and commits every step.
    """

    def __init__(self, method: Method, num_samples: int, cut: int) -> None:
        self.backward = get_codec(method.backward)
        self.codec: Codec | None = None
        self.ends: tuple[DeltaSender, DeltaReceiver] | None = None
        self.sent_bytes = self.sent_values = 0
        if method.forward.startswith("aq/"):
            values = CONTEXT * DIM
            scope = b"pilot, cut %d" % cut
            caches = [DeltaCache(2 * values * num_samples, values) for _ in range(2)]
            self.ends = (
                DeltaSender(method.forward, scope, caches[0]),
                DeltaReceiver(method.forward, scope, caches[1]),
            )
        else:
            self.codec = get_codec(method.forward)

    def send(self, hidden_BSD: Tensor, ids_B: Sequence[int] | None) -> Tensor:
        """What the next stage computes on; without ids, samples that are seen only once."""
        if self.codec is not None:
            payload = self.codec.encode(hidden_BSD)
            received_BSD = self.codec.decode(payload, hidden_BSD.shape)
            num_bytes = len(payload)
        elif ids_B is None:
            return hidden_BSD.to(torch.bfloat16).float()
        else:
            assert self.ends is not None
            sender, receiver = self.ends
            received, num_bytes = [], 0
            for sample, hidden_SD in zip(ids_B, hidden_BSD, strict=True):
                frame = sender.prepare(b"%d" % sample, hidden_SD)
                num_bytes += len(frame)
                tensor = receiver.receive(frame).tensor
                assert tensor is not None, "nothing is lost here, so nothing is refused"
                received.append(tensor)
            received_BSD = torch.stack(received)
        if ids_B is not None:
            self.sent_bytes += num_bytes
            self.sent_values += hidden_BSD.numel()
        return received_BSD

    def commit(self) -> None:
        for end in self.ends or ():
            end.commit()


class Crossing(torch.autograd.Function):
    """The identity, for derivatives, of what a boundary does: both ways lossy."""

    @staticmethod
    def forward(ctx, hidden_BSD, boundary, ids_B):  # noqa: ANN001, ANN205 - torch's own shape
        ctx.codec = boundary.backward
        return boundary.send(hidden_BSD, ids_B)

    @staticmethod
    def backward(ctx, grad_BSD):  # noqa: ANN001, ANN205
        payload = ctx.codec.encode(grad_BSD)
        return ctx.codec.decode(payload, grad_BSD.shape), None, None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(DIM, bias=False) for _ in range(2)])
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.out = nn.Linear(DIM, DIM, bias=False)
        self.up = nn.Linear(DIM, 4 * DIM, bias=False)
        self.down = nn.Linear(4 * DIM, DIM, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        num_samples, length, _ = x_BSD.shape
        qkv = self.qkv(self.norms[0](x_BSD)).view(num_samples, length, 3, NUM_HEADS, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BSD = x_BSD + self.out(mixed.transpose(1, 2).reshape(x_BSD.shape))
        return x_BSD + self.down(F.gelu(self.up(self.norms[1](x_BSD))))


class Pilot(nn.Module):
    """Four blocks with a cut after each but the last; the head shares the embedding."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, DIM)
        self.positions = nn.Embedding(CONTEXT, DIM)
        self.blocks = nn.ModuleList([Block() for _ in range(NUM_LAYERS)])
        self.norm = nn.LayerNorm(DIM, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
        for block in self.blocks:
            for layer in (block.out, block.down):
                with torch.no_grad():
                    layer.weight /= math.sqrt(2 * NUM_LAYERS)

    def loss(
        self, text_BS: Tensor, boundaries: Sequence[Boundary], ids_B: Sequence[int] | None
    ) -> Tensor:
        """Mean nats per byte of windows of CONTEXT + 1 bytes."""
        hidden_BSD = (self.embedding(text_BS[:, :-1]) + self.positions.weight) * math.sqrt(DIM)
        for index, block in enumerate(self.blocks):
            hidden_BSD = block(hidden_BSD)
            if index < len(boundaries):
                hidden_BSD = Crossing.apply(hidden_BSD, boundaries[index], ids_B)
        logits = self.norm(hidden_BSD) @ self.embedding.weight.t()
        return F.cross_entropy(logits.flatten(0, 1), text_BS[:, 1:].flatten())


@dataclass(frozen=True)
class Windows:
    """Fixed samples, and held out ones from the end of the text."""

    train: Tensor
    validation: Tensor
    seed: int
    num_epochs: int
    orders: list[list[int]] = field(default_factory=list)

    @staticmethod
    def of(text: bytes, seed: int, num_samples: int, num_epochs: int) -> "Windows":
        """The last tenth is held out. Every epoch has its own order, which the seed decides."""
        generator = torch.Generator().manual_seed(1000 + seed)
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        split = len(data) * 9 // 10
        parts = []
        for part, count in ((data[:split], num_samples), (data[split:], NUM_VALIDATION)):
            starts = torch.randint(len(part) - CONTEXT, (count,), generator=generator)
            parts.append(torch.stack([part[s : s + CONTEXT + 1] for s in starts.tolist()]))
        orders = [
            torch.randperm(num_samples, generator=generator).tolist() for _ in range(num_epochs)
        ]
        return Windows(parts[0], parts[1], seed, num_epochs, orders)


def train(method: Method, windows: Windows, report: Callable[[str], None]) -> Result:
    """One run: the same start, samples and order for every method."""
    model = Pilot(windows.seed)
    num_samples = len(windows.train)
    num_cuts = NUM_CUTS if method.forward else 0
    boundaries = [Boundary(method, num_samples, cut) for cut in range(num_cuts)]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1
    )
    batches = [
        order[start : start + BATCH]
        for order in windows.orders
        for start in range(0, num_samples - BATCH + 1, BATCH)
    ]
    losses = []
    for step, ids_B in enumerate(batches):
        for group in optimizer.param_groups:
            rest = (len(batches) - step) / (COOLDOWN * len(batches))  # to zero: less noise
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS, rest)
        optimizer.zero_grad(set_to_none=True)
        loss = model.loss(windows.train[ids_B], boundaries, ids_B)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for boundary in boundaries:
            boundary.commit()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        parts = windows.validation.split(64)
        validation = sum(float(model.loss(part, boundaries, None)) for part in parts) / len(parts)
    tail = losses[-max(1, len(losses) // 10) :]
    values = sum(boundary.sent_values for boundary in boundaries)
    bits = 8 * sum(boundary.sent_bytes for boundary in boundaries) / values if values else 32.0
    result = Result(sum(tail) / len(tail), validation, bits)
    report(f"seed {windows.seed} {method.name}: train {result.train:.4f} val {validation:.4f}")
    return result
