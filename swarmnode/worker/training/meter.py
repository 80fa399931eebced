"""Counts what coding costs and saves, by kind and codec; now and then, what it loses."""

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from swarmnode.codings import Coding, total
from swarmnode.compression.codec import Payload
from swarmnode.messages import FrameKind
from swarmnode.traces import OnSpan, ignore_span

MEASURE_EVERY = 32
"""Of so many tensors of a kind and codec, the error of one is measured: it is decoded for that."""


ResultT = TypeVar("ResultT")


class CodingMeter:
    """All coding of one process since it was last asked. `clock` gives seconds."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, on_span: OnSpan = ignore_span
    ) -> None:
        self._clock = clock
        self._on_span = on_span
        self._found: tuple[Coding, ...] = ()
        self._num_seen: Counter[tuple[FrameKind, str]] = Counter()

    def encode(
        self,
        kind: FrameKind,
        codec: str,
        values: Tensor,
        encode: Callable[[], Payload],
        error_of: Callable[[Payload], Tensor | None],
    ) -> Payload:
        """What `encode` gives for `values`; `error_of` is the tensor that it lost, if known."""
        began_s = self._clock()
        payload = encode()
        ended_s = self._clock()
        spent_s = ended_s - began_s
        self._on_span("encode", began_s, ended_s, kind=kind)
        seen = lost = 0.0
        if self._num_seen[kind, codec] % MEASURE_EVERY == 0:
            error = error_of(payload)
            if error is not None:
                seen, lost = _energy(values), _energy(error)
                if not (math.isfinite(seen) and math.isfinite(lost)):
                    seen = lost = 0.0
        self._num_seen[kind, codec] += 1
        num_bytes = memoryview(payload).nbytes
        self._add(Coding(kind, codec, 4 * values.numel(), num_bytes, spent_s, seen, lost))
        return payload

    def decode(self, kind: FrameKind, codec: str, decode: Callable[[], ResultT]) -> ResultT:
        """What `decode` gives."""
        began_s = self._clock()
        result = decode()
        ended_s = self._clock()
        self._on_span("decode", began_s, ended_s, kind=kind)
        self._add(Coding(kind, codec, 0, 0, ended_s - began_s, 0.0, 0.0))
        return result

    def take(self) -> tuple[Coding, ...]:
        """What has come since the last call."""
        found, self._found = self._found, ()
        return found

    def _add(self, coding: Coding) -> None:
        self._found = total((*self._found, coding))


def _energy(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
