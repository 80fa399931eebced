"""Which tokens each microbatch of each step sees, and how they are read from chunks.

The stream is cut into windows of `sequence_length` + 1 tokens whose starts are
`sequence_length` apart: each token but the first is predicted once. An epoch visits every
window once, in an order that only the seed and the number of the epoch decide.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from swarmnode.domain import BlobRef
from swarmnode.errors import ChunkError, DataError
from swarmnode.tokens import TOKEN_BYTES, TokenIndex

_NUM_ROUNDS = 6
_MASK = (1 << 64) - 1
_LANE = 0xD1342543DE82EF95
_MAX_MAPPED_CHUNKS = 64


def num_windows(num_tokens: int, sequence_length: int) -> int:
    """How many windows the stream has: every token but the first is a target, the rest is cut.

    Raises: DataError if there is not even one.
    """
    count = (num_tokens - 1) // sequence_length
    if count < 1:
        raise DataError(
            f"{num_tokens} tokens are fewer than one sequence of {sequence_length} + 1; "
            "give more text or a shorter sequence_length"
        )
    return count


@dataclass(frozen=True)
class SampleMap:
    """The map (step, microbatch) -> windows of the training stream: a pure function.

    With lanes, microbatch mb only sees windows of lane mb % num_lanes, in every epoch: whoever
    computes a lane meets its samples again. Up to `num_lanes` - 1 windows are then left out.
    """

    seed: int
    num_tokens: int
    sequence_length: int
    rows: int
    num_microbatches: int
    num_lanes: int = 1

    def __post_init__(self) -> None:
        """Raises: DataError if the stream is shorter than one window for each lane."""
        assert self.num_microbatches % self.num_lanes == 0
        if num_windows(self.num_tokens, self.sequence_length) < self.num_lanes:
            raise DataError(f"{self.num_tokens} tokens are too few for {self.num_lanes} pipelines")

    @property
    def windows_per_epoch(self) -> int:
        """Of one lane."""
        return num_windows(self.num_tokens, self.sequence_length) // self.num_lanes

    def sample_offsets(self, step: int, microbatch: int) -> tuple[int, ...]:
        """Where each of the `rows` windows of the microbatch starts, in tokens.

        A batch may straddle two epochs; steps count from 0 and have no end.
        """
        assert step >= 0
        assert 0 <= microbatch < self.num_microbatches
        number, lane = divmod(step * self.num_microbatches + microbatch, self.num_lanes)
        first, count = number * self.rows, self.windows_per_epoch
        places = (divmod(first + row, count) for row in range(self.rows))
        windows = (
            permute(place, count, _epoch_key(self.seed, epoch) + lane * _LANE)
            for epoch, place in places
        )
        return tuple((w * self.num_lanes + lane) * self.sequence_length for w in windows)


def num_validation_microbatches(num_tokens: int, sequence_length: int, rows: int, most: int) -> int:
    """How many whole microbatches of held-out windows there are, from 1 to `most`."""
    return max(1, min(most, num_windows(num_tokens, sequence_length) // rows))


def validation_offsets(
    num_tokens: int, sequence_length: int, rows: int, num_microbatches: int, microbatch: int
) -> tuple[int, ...]:
    """Where the windows of one held-out microbatch start: the same at every evaluation.

    The rows * num_microbatches windows are spread evenly over the stream; where the stream
    has fewer, some repeat, so that the shape of a microbatch never changes.
    """
    assert 0 <= microbatch < num_microbatches
    count = num_windows(num_tokens, sequence_length)
    total = rows * num_microbatches
    first = microbatch * rows
    return tuple((first + row) * count // total * sequence_length for row in range(rows))


def chunks_needed(
    offsets: Sequence[int], index: TokenIndex, sequence_length: int
) -> frozenset[int]:
    """The numbers of the chunks that the windows at `offsets` touch."""
    size = index.chunk_tokens
    return frozenset(
        chunk
        for start in offsets
        for chunk in range(start // size, (start + sequence_length) // size + 1)
    )


def permute(place: int, count: int, key: int) -> int:
    """The image of `place` under a permutation of range(count) that `key` picks.

    A Feistel network over the next even power of two, walked until the result is in range:
    no table, the same on every machine; on average at most four walks.
    """
    half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = place >> half_bits, place & mask
        for number in range(_NUM_ROUNDS):
            left, right = right, left ^ (_mix(right ^ _mix(key + number)) & mask)
        place = left << half_bits | right
        if place < count:
            return place


def _mix(value: int) -> int:
    """The finalizer of splitmix64: every input bit reaches every output bit."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _epoch_key(seed: int, epoch: int) -> int:
    digest = hashlib.sha256(f"swarmnode samples {seed} {epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


class TokenReader:
    """Reads windows of a token stream from chunk files, memory-mapped, at most 64 at a time.

    `path_of` names the file of a chunk that has been fetched; its hash was checked then.
    """

    def __init__(
        self,
        index: TokenIndex,
        path_of: Callable[[BlobRef], Path],
        *,
        vocab_size: int | None = None,
    ) -> None:
        self._index = index
        self._path_of = path_of
        self._vocab_size = vocab_size
        self._mapped: OrderedDict[int, NDArray[np.generic]] = OrderedDict()

    def read(self, offsets: Sequence[int], sequence_length: int) -> NDArray[np.int64]:
        """Token ids of the windows at `offsets`: shape (len(offsets), sequence_length + 1).

        Raises: ChunkError if a chunk is absent or has the wrong size; DataError if a window
        is not within the stream or an id is not below `vocab_size`.
        """
        length = sequence_length + 1
        if any(not 0 <= start <= self._index.num_tokens - length for start in offsets):
            raise DataError(f"a sample is not within the {self._index.num_tokens} tokens")
        out = np.empty((len(offsets), length), dtype=np.int64)
        for row, start in enumerate(offsets):
            done = 0
            while done < length:
                chunk, within = divmod(start + done, self._index.chunk_tokens)
                piece = self._chunk(chunk)[within : within + length - done]
                out[row, done : done + len(piece)] = piece
                done += len(piece)
        if self._vocab_size is not None and out.size and int(out.max()) >= self._vocab_size:
            raise DataError(f"token id {int(out.max())} in a vocabulary of {self._vocab_size}")
        return out

    def _chunk(self, number: int) -> NDArray[np.generic]:
        mapped = self._mapped.pop(number, None)
        if mapped is None:
            mapped = self._map(number)
            if len(self._mapped) >= _MAX_MAPPED_CHUNKS:
                self._mapped.popitem(last=False)
        self._mapped[number] = mapped
        return mapped

    def _map(self, number: int) -> NDArray[np.generic]:
        ref = self._index.chunks[number]
        path = self._path_of(ref)
        try:
            if path.stat().st_size != ref.num_bytes:
                raise ChunkError(f"chunk {number} has the wrong size; fetch it again")
            dtype = np.dtype(f"<u{TOKEN_BYTES[self._index.dtype]}")
            return np.memmap(path, dtype=dtype, mode="r", shape=(self._index.tokens_in(number),))
        except OSError as error:
            raise ChunkError(f"chunk {number} cannot be read: {error}") from error
