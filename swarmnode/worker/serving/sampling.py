"""Picks the next token from logits: greedy, or nucleus sampling that a seed makes repeatable.

Letters: V vocabulary.
"""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from swarmnode.session_messages import (
    Sampling,
)

MAX_LOGPROBS = 32


class Sampled(NamedTuple):
    """A token, its log-probability before temperature, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def sample(logits_V: Tensor, sampling: Sampling, position: int) -> Sampled:
    """Pick the token at `position`; the same arguments always give the same token.

    Greedy at temperature 0 (the lowest id among equals), else from the smallest set of tokens
    whose probability reaches `top_p`, with a generator seeded by (seed, position).
    """
    logits_V = logits_V.detach().float().cpu()
    logprobs_V = torch.log_softmax(logits_V, dim=-1)
    if sampling.temperature <= 0.0:
        token = int(logits_V.argmax())
    else:
        token = _nucleus(logits_V / sampling.temperature, sampling, position)
    count = min(sampling.num_logprobs, MAX_LOGPROBS, logits_V.numel())
    values, tokens = torch.topk(logprobs_V, count) if count > 0 else (logprobs_V[:0],) * 2
    top = tuple((int(t), float(v)) for t, v in zip(tokens, values, strict=True))
    return Sampled(token, float(logprobs_V[token]), top)


def _nucleus(logits_V: Tensor, sampling: Sampling, position: int) -> int:
    sorted_V, tokens_V = torch.sort(torch.softmax(logits_V, dim=-1), descending=True, stable=True)
    before_V = sorted_V.cumsum(dim=-1) - sorted_V
    kept_V = torch.where(before_V < sampling.top_p, sorted_V, 0.0)
    kept_V[0] = sorted_V[0]  # the likeliest token stays whatever top_p is
    seed = hashlib.sha256(f"{sampling.seed}/{position}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)
    return int(tokens_V[torch.multinomial(kept_V, 1, generator=generator)])
