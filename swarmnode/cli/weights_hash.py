"""One hash over all weights of a Hugging Face folder, the same however files cut them."""

import hashlib
import json
from pathlib import Path

from swarmnode.errors import DataError
from swarmnode.tensorfiles import TensorSpan, read_header

_PIECE_BYTES = 4 << 20


def weights_sha256(folder: Path) -> str:
    """SHA-256 over the tensors of a safetensors file or folder, sorted by name, as hex.

    Of each tensor `[name, dtype, shape]` as JSON without spaces, a line feed, then its bytes:
    row-major, little endian. Raises: DataError if a file cannot be read.
    """
    digest = hashlib.sha256()
    for name, span in sorted(read_header(folder).items()):
        head = json.dumps([name, span.dtype, span.shape], separators=(",", ":"))
        digest.update(head.encode() + b"\n")
        _add(digest, span)
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", span: TensorSpan) -> None:
    """Add the bytes of one tensor, piece by piece."""
    left = span.num_bytes
    try:
        with span.file.open("rb") as file:
            file.seek(span.offset)
            while left > 0 and (piece := file.read(min(left, _PIECE_BYTES))):
                digest.update(piece)
                left -= len(piece)
    except OSError as error:
        raise DataError(f"cannot read {span.file}: {error.strerror}") from error
    if left:
        raise DataError(f"{span.file} ended early: it changed while it was read")
