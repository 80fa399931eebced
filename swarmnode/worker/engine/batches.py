"""The token rows of every microbatch, read from chunks that the daemon has fetched."""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from swarmnode.domain import BlobRef
from swarmnode.errors import ChunkError, DataError
from swarmnode.manifest import Manifest
from swarmnode.tokens import TokenIndex
from swarmnode.worker.training.samples import (
    SampleMap,
    TokenReader,
    num_validation_microbatches,
    validation_offsets,
)
from swarmnode.worker.training.slots import num_evaluation_microbatches


class Batches:
    """Reads microbatches as (rows, sequence_length + 1) int64: inputs and labels overlap.

    Both token indexes must be in the blob directory; chunks are looked for when they are read.
    Raises: ChunkError if an index is absent or damaged, DataError if there is too little data.
    """

    def __init__(self, manifest: Manifest, blob_directory: Path) -> None:
        if manifest.data is None:
            raise DataError("the manifest names no data")
        self._batch = batch = manifest.batch
        self._directory = blob_directory
        train = _index(blob_directory, manifest.data.train)
        validation = _index(blob_directory, manifest.data.validation)
        vocab_size = manifest.model.config.get("vocab_size")
        self._train = TokenReader(train, self._path, vocab_size=vocab_size)
        self._validation = TokenReader(validation, self._path, vocab_size=vocab_size)
        self._samples = _sample_map(manifest, train)
        self._num_validation_tokens = validation.num_tokens
        most = manifest.run.evaluate_microbatches
        self.num_evaluation_microbatches = num_evaluation_microbatches(
            wanted=most,
            available=num_validation_microbatches(
                validation.num_tokens, batch.sequence_length, batch.rows, most
            ),
            num_slots=manifest.placement.slots,
        )

    def training(self, step: int, microbatch: int) -> NDArray[np.int64]:
        """The rows of one microbatch of a step. Raises: ChunkError, DataError."""
        offsets = self._samples.sample_offsets(step, microbatch)
        return self._train.read(offsets, self._batch.sequence_length)

    def validation(self, microbatch: int) -> NDArray[np.int64]:
        """The rows of one held-out microbatch. Raises: ChunkError, DataError."""
        offsets = validation_offsets(
            self._num_validation_tokens,
            self._batch.sequence_length,
            self._batch.rows,
            self.num_evaluation_microbatches,
            microbatch,
        )
        return self._validation.read(offsets, self._batch.sequence_length)

    def _path(self, ref: BlobRef) -> Path:
        return _path(self._directory, ref)


def sample_map(manifest: Manifest, blob_directory: Path) -> SampleMap:
    """Which samples are in which microbatch: known from the index alone, without any text.

    Raises: ChunkError if the index is absent or damaged, DataError if there is too little data.
    """
    assert manifest.data is not None
    return _sample_map(manifest, _index(blob_directory, manifest.data.train))


def _sample_map(manifest: Manifest, train: TokenIndex) -> SampleMap:
    batch = manifest.batch
    return SampleMap(
        manifest.run.seed,
        train.num_tokens,
        batch.sequence_length,
        batch.rows,
        manifest.microbatches_per_step,
        manifest.placement.slots if manifest.codecs.keeps_deltas else 1,
    )


def _path(directory: Path, ref: BlobRef) -> Path:
    return directory / ref.sha256[:2] / ref.sha256


def _index(directory: Path, ref: BlobRef) -> TokenIndex:
    try:
        data = _path(directory, ref).read_bytes()
    except OSError as error:
        raise ChunkError(f"token index {ref.sha256:.12} is not here") from error
    if hashlib.sha256(data).hexdigest() != ref.sha256:
        raise ChunkError(f"token index {ref.sha256:.12} is damaged")
    return TokenIndex.parse(data)
