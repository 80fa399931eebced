"""Counts what coding costs and saves, by kind and codec; now and then, what it loses.

Letters: B rows, S positions, D hidden width.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
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
        payload, spent_s = self._timed("encode", kind, encode)
        self._count(kind, codec, values, payload, spent_s, lambda: error_of(payload))
        return payload

    def encode_rows(
        self,
        kind: FrameKind,
        values_BSD: Tensor,
        encode: Callable[[], Sequence[Payload]],
        codec_of: Callable[[Payload], str],
        error_of: Callable[[int], Tensor | None],
    ) -> bytearray:
        """The same for rows, each coded in its own way, in one; all take the same time."""
        frames, spent_s = self._timed("encode", kind, encode)
        for row, frame in enumerate(frames):
            share_s, error = spent_s / len(frames), partial(error_of, row)
            self._count(kind, codec_of(frame), values_BSD[row], frame, share_s, error)
        return bytearray().join(frames)

    def _count(
        self,
        kind: FrameKind,
        codec: str,
        values: Tensor,
        payload: Payload,
        spent_s: float,
        error_of: Callable[[], Tensor | None],
    ) -> None:
        seen = lost = 0.0
        if self._num_seen[kind, codec] % MEASURE_EVERY == 0:
            error = error_of()
            if error is not None:
                seen, lost = _energy(values), _energy(error)
                if not (math.isfinite(seen) and math.isfinite(lost)):
                    seen = lost = 0.0
        self._num_seen[kind, codec] += 1
        num_bytes = memoryview(payload).nbytes
        self._add(Coding(kind, codec, 4 * values.numel(), num_bytes, spent_s, seen, lost))

    def decode(self, kind: FrameKind, codec: str, decode: Callable[[], ResultT]) -> ResultT:
        """What `decode` gives."""
        return self.decode_rows(kind, [codec], decode)

    def decode_rows(
        self, kind: FrameKind, codecs: Sequence[str], decode: Callable[[], ResultT]
    ) -> ResultT:
        """The same for rows, each coded in its own way; all take the same time."""
        result, spent_s = self._timed("decode", kind, decode)
        for codec in codecs:
            self._add(Coding(kind, codec, 0, 0, spent_s / len(codecs), 0.0, 0.0))
        return result

    def _timed(
        self, what: str, kind: FrameKind, work: Callable[[], ResultT]
    ) -> tuple[ResultT, float]:
        began_s = self._clock()
        result = work()
        ended_s = self._clock()
        self._on_span(what, began_s, ended_s, kind=kind)
        return result, ended_s - began_s

    def take(self) -> tuple[Coding, ...]:
        """What has come since the last call."""
        found, self._found = self._found, ()
        return found

    def _add(self, coding: Coding) -> None:
        self._found = total((*self._found, coding))


def _energy(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
