"""Whose fault it is that bytes cannot be used: the line is authenticated, so it is the sender's."""

from collections.abc import Iterator
from contextlib import contextmanager

from swarmnode.domain import SlotId
from swarmnode.errors import CodecError, FrameError, HistoryError


@contextmanager
def blaming(source: SlotId) -> Iterator[None]:
    """What does not decode in the block came from `source`. Raises: FrameError for CodecError."""
    try:
        yield
    except CodecError as error:
        is_mismatch = isinstance(error, HistoryError)
        raise FrameError(source.stage, source.slot, str(error), is_mismatch=is_mismatch) from error
