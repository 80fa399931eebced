"""Text on the submitter's disk becomes token chunks in a blob store, in bounded memory.

A source is a text file (one document), JSONL (one document per line, its `text` field) or a
folder of both, read in the order of the paths. All documents make one token stream; its tail
is held out for validation.
"""

import codecs
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from swarmnode.errors import DataError, SwarmError
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.tokens import TOKEN_BYTES, TokenDtype, TokenIndex, full_chunk_tokens, token_dtype

PIECE_CHARACTERS = 1 << 18
"""Text is read and tokenized in pieces of at most this much, cut at line ends where possible."""
MAX_LINE_BYTES = 64 << 20
"""Longest line of a JSONL file."""
_SNIFFED_BYTES = 8192

Encode = Callable[[str], Sequence[int] | NDArray[np.integer]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Corpus:
    """The two streams of a training job; both hold at least one sequence."""

    train: TokenIndex
    validation: TokenIndex


class _Piece(NamedTuple):
    text: str
    ends_document: bool
    source_bytes: int
    """How much of the source this piece took."""


def encode_bytes(text: str) -> NDArray[np.integer]:
    """One token per UTF-8 byte: the id is the byte's value."""
    return np.frombuffer(text.encode(), dtype=np.uint8)


def build_corpus(
    source: Path,
    store: BlobStore,
    *,
    sequence_length: int,
    vocab_size: int = 256,
    encode: Encode = encode_bytes,
    document_end: int | None = None,
    validation_fraction: float = 0.05,
    max_bytes: int | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Tokenize `source` and put its chunks of 1 MiB into `store`; the same input, the same chunks.

    `encode` turns text into ids below `vocab_size`, the model's; `document_end` is an id that
    goes behind each document. The last `validation_fraction` of the tokens, at least one
    sequence, are held out. `max_bytes` bounds the text that is read. `progress(done_bytes,
    total_bytes)` is called along the way; an exception in it stops the work.
    Needs room for the tokens twice while it works.

    Raises: DataError with one line that says what is wrong with the source and what to do;
    SwarmError if the disk is full.
    """
    files = _find_files(source)
    dtype = token_dtype(vocab_size)
    num_tokens = 0
    try:
        with tempfile.TemporaryFile(dir=store.scratch) as spool:
            for ids in _encode_all(files, encode, document_end, max_bytes, progress):
                _check_ids(ids, vocab_size)
                spool.write(ids.astype(f"<u{TOKEN_BYTES[dtype]}").tobytes())
                num_tokens += ids.size
            held_out = max(sequence_length + 1, round(num_tokens * validation_fraction))
            cut = num_tokens - held_out
            if cut < sequence_length + 1:
                raise DataError(
                    f"{source}: {num_tokens} tokens are too few for training and validation "
                    f"sequences of {sequence_length} + 1; "
                    "give more text or a shorter sequence_length"
                )
            return Corpus(
                train=_put_chunks(spool, store, dtype, 0, cut),
                validation=_put_chunks(spool, store, dtype, cut, num_tokens),
            )
    except OSError as error:
        raise SwarmError(
            f"cannot write tokens to {store.root}: {error.strerror}; free some space"
        ) from error


def _encode_all(
    files: Sequence[Path],
    encode: Encode,
    document_end: int | None,
    max_bytes: int | None,
    progress: Progress | None,
) -> Iterator[NDArray[np.int64]]:
    """Token ids, piece by piece."""
    total_bytes = sum(path.stat().st_size for path in files)
    done_bytes = 0
    left_bytes = max_bytes
    for piece in (piece for path in files for piece in _read(path)):
        text = piece.text
        if left_bytes is not None:
            data = text.encode()[:left_bytes]
            left_bytes -= len(data)
            text = data.decode(errors="ignore")
        yield np.asarray(encode(text), dtype=np.int64)
        if document_end is not None and (piece.ends_document or left_bytes == 0):
            yield np.array([document_end], dtype=np.int64)
        done_bytes += piece.source_bytes
        if progress is not None:
            progress(min(done_bytes, total_bytes), total_bytes)
        if left_bytes == 0:
            break
    if progress is not None:
        progress(total_bytes, total_bytes)


def _check_ids(ids: NDArray[np.int64], vocab_size: int) -> None:
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        wrong = int(ids.max()) if int(ids.max()) >= vocab_size else int(ids.min())
        raise DataError(
            f"token id {wrong} does not fit the model's vocabulary of {vocab_size}; "
            "use the model's own tokenizer or a larger vocab_size"
        )


def _put_chunks(
    spool: IO[bytes], store: BlobStore, dtype: TokenDtype, start: int, stop: int
) -> TokenIndex:
    """Store the tokens [start, stop) of the spool."""
    chunk_tokens = full_chunk_tokens(dtype)
    spool.seek(start * TOKEN_BYTES[dtype])
    chunks = tuple(
        store.put(spool.read(min(chunk_tokens, stop - first) * TOKEN_BYTES[dtype]))
        for first in range(start, stop, chunk_tokens)
    )
    return TokenIndex(dtype, chunk_tokens, stop - start, chunks)


# ---- finding and reading text -------------------------------------------------------------------


def _find_files(source: Path) -> list[Path]:
    """The text files of the source, by path; hidden ones and those that are no text are left out.

    Raises: DataError if there are none.
    """
    if source.is_file():
        if not source.stat().st_size:
            raise DataError(f"{source}: the file is empty; give a file with text")
        return [source]
    if not source.is_dir():
        what = "not a file or folder" if source.exists() else "no such file or folder"
        raise DataError(f"{source}: {what}; give the path of a text file, JSONL or a folder")
    found = []
    for folder, folders, names in os.walk(source):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        found += [path for path in paths if path.is_file() and _is_text(path)]
    if not found:
        raise DataError(f"{source}: no text in this folder; give one with UTF-8 text files")
    return sorted(found, key=lambda path: path.relative_to(source).as_posix())


def _is_text(path: Path) -> bool:
    """Whether the file is not empty and begins as UTF-8 without a zero byte."""
    try:
        with path.open("rb") as file:
            head = file.read(_SNIFFED_BYTES)
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < _SNIFFED_BYTES)
    except UnicodeDecodeError:
        return False
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return bool(head) and b"\0" not in head


def _read(path: Path) -> Iterator[_Piece]:
    """The documents of one file, in pieces. Raises: DataError if it is not what it should be."""
    try:
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            yield from _read_jsonl(path)
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                yield from _split(file)
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text; convert it or take it out") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _split(file: TextIO) -> Iterator[_Piece]:
    """Cut one document at the last line end of each piece, else before a space, else anywhere."""
    text = file.read(PIECE_CHARACTERS)
    while text:
        if len(text) <= PIECE_CHARACTERS:
            text += file.read(PIECE_CHARACTERS)
        if len(text) <= PIECE_CHARACTERS:
            yield _Piece(text, True, len(text.encode()))
            return
        cut = text.rfind("\n", 0, PIECE_CHARACTERS) + 1 or text.rfind(" ", 1, PIECE_CHARACTERS)
        cut = cut if cut > 0 else PIECE_CHARACTERS
        yield _Piece(text[:cut], False, len(text[:cut].encode()))
        text = text[cut:]


def _read_jsonl(path: Path) -> Iterator[_Piece]:
    """One document per line that is not blank."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}: line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{where} is longer than {MAX_LINE_BYTES >> 20} MiB; split it")
            if line.isspace():
                continue
            try:
                row = json.loads(line)
                text = row["text"]
                text.encode()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise DataError(
                    f'{where} is not a JSON object with a string "text"; correct or remove it'
                ) from None
            for piece in _split(io.StringIO(text, newline="")):
                yield piece._replace(source_bytes=len(line) if piece.ends_document else 0)
