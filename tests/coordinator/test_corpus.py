"""A corpus: every token once, in order, in checked chunks; bad input says what to do."""

import itertools
import json
import os
import random
import resource
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from swarmnode.coordinator import corpus
from swarmnode.coordinator.corpus import Corpus, build_corpus
from swarmnode.domain import BlobRef
from swarmnode.errors import DataError, SwarmError
from swarmnode.p2p.blob_store import BlobStore, blob_path
from swarmnode.tokens import TokenIndex
from swarmnode.worker.training.samples import TokenReader


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def tokens_of(index: TokenIndex, store: BlobStore) -> list[int]:
    data = b"".join(store.read(chunk) for chunk in index.chunks)
    return np.frombuffer(data, dtype=index.dtype).tolist()


def all_tokens(built: Corpus, store: BlobStore) -> list[int]:
    return tokens_of(built.train, store) + tokens_of(built.validation, store)


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def test_a_text_file_becomes_its_bytes(tmp_path: Path, store: BlobStore) -> None:
    text = "Gr\u00fc\u00dfe, \U0001f40d\r\n" * 100
    source = write(tmp_path, {"a.txt": text}) / "a.txt"
    built = build_corpus(source, store, sequence_length=10, validation_fraction=0.1)
    assert all_tokens(built, store) == list(text.encode())
    assert built.validation.num_tokens == round(len(text.encode()) * 0.1)
    assert built.train.dtype == "uint16"
    assert TokenIndex.parse(built.train.canonical()) == built.train


def test_what_is_built_is_what_a_worker_reads(tmp_path: Path, store: BlobStore) -> None:
    text = "".join(random.Random(3).choices("abcdefgh \n", k=700_000))
    source = write(tmp_path, {"a.txt": text}) / "a.txt"
    built = build_corpus(source, store, sequence_length=64)
    assert [chunk.num_bytes for chunk in built.train.chunks] == [1 << 20, 1_330_000 - (1 << 20)]
    reader = TokenReader(built.train, partial(blob_path, store.root), vocab_size=256)
    offset = (1 << 19) - 20
    assert bytes(reader.read((offset,), 64)[0].tolist()).decode() == text[offset : offset + 65]


def test_the_same_source_gives_the_same_chunks(tmp_path: Path) -> None:
    source = write(tmp_path / "texts", {"b.txt": "bbb" * 99, "a/c.md": "c" * 99, "a.py": "a" * 99})
    one, two = BlobStore(tmp_path / "1"), BlobStore(tmp_path / "2")
    assert build_corpus(source, one, sequence_length=8) == build_corpus(
        source, two, sequence_length=8
    )


def test_a_folder_is_read_by_path_and_only_its_text(tmp_path: Path, store: BlobStore) -> None:
    source = write(
        tmp_path / "texts",
        {
            "b.txt": "B" * 20,
            "a/z.rst": "Z" * 20,
            "a/deep/er/x": "X" * 20,
            "rows.jsonl": '{"text": "JJJJJ", "id": 1}\n\n{"text": "KKKKK"}\n',
            ".hidden.txt": "no",
            ".git/config": "no",
            "image.png": b"\x89PNG\x00\x00",
            "latin.txt": "caf\u00e9".encode("latin-1"),
            "empty.txt": "",
        },
    )
    built = build_corpus(source, store, sequence_length=4, vocab_size=257, document_end=256)
    expected = [b"X" * 20, b"Z" * 20, b"B" * 20, b"JJJJJ", b"KKKKK"]
    assert all_tokens(built, store) == [t for doc in expected for t in (*doc, 256)]


def test_large_vocabularies_take_four_bytes(tmp_path: Path, store: BlobStore) -> None:
    source = write(tmp_path, {"a.txt": "word " * 50}) / "a.txt"
    built = build_corpus(
        source, store, sequence_length=4, vocab_size=100_000, document_end=99_999,
        encode=lambda text: [70_000 + len(word) for word in text.split()],
    )  # fmt: skip
    assert built.train.dtype == "uint32"
    assert all_tokens(built, store) == [70_004] * 50 + [99_999]


def test_long_texts_are_cut_at_line_ends_and_nothing_is_lost(
    tmp_path: Path, store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "PIECE_CHARACTERS", 50)
    text = "\n" + "x" * 49 + "\u00e9" * 120 + " and words " * 30 + "".join(
        "line " * (number % 7) + "\n" for number in range(200)
    )  # fmt: skip
    seen: list[str] = []

    def encode(text: str) -> list[int]:
        seen.append(text)
        return list(text.encode())

    source = write(tmp_path, {"a.txt": text}) / "a.txt"
    built = build_corpus(
        source, store, sequence_length=4, vocab_size=257, encode=encode, document_end=256
    )
    assert all_tokens(built, store) == [*text.encode(), 256]
    assert max(map(len, seen)) <= 50
    assert sum(piece.endswith("\n") for piece in seen) > 20
    for left, right in itertools.pairwise(seen):
        is_forced = len(left) == 50 and not set(left[1:]) & {" ", "\n"}
        assert left.endswith("\n") or right.startswith(" ") or is_forced


def test_reading_stops_at_max_bytes(tmp_path: Path, store: BlobStore) -> None:
    source = write(tmp_path / "t", {"a.txt": "\u00e9" * 30, "b.txt": "b" * 1000})
    built = build_corpus(source, store, sequence_length=4, max_bytes=81)
    assert all_tokens(built, store) == list(("\u00e9" * 30 + "b" * 21).encode())
    odd = build_corpus(source, store, sequence_length=4, max_bytes=41)
    assert all_tokens(odd, store) == list(("\u00e9" * 20).encode())


def test_progress_rises_to_the_total(tmp_path: Path, store: BlobStore) -> None:
    rows = "".join(json.dumps({"text": "t" * number, "n": number}) + "\n" for number in range(90))
    source = write(tmp_path / "t", {"a.txt": "a" * 1000, "b.jsonl": rows})
    seen: list[tuple[int, int]] = []
    build_corpus(source, store, sequence_length=4, progress=lambda *done: seen.append(done))
    assert seen == sorted(seen)
    assert seen[0] == (1000, 1000 + len(rows))
    assert seen[-1] == (1000 + len(rows), 1000 + len(rows))


def test_memory_stays_bounded(tmp_path: Path, store: BlobStore) -> None:
    source = write(tmp_path, {"a.txt": "All work and no play.\n" * (1 << 19)}) / "a.txt"
    tracemalloc.start()
    try:
        built = build_corpus(source, store, sequence_length=64)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert built.train.num_tokens + built.validation.num_tokens == 22 << 19
    assert peak_bytes < 9 << 20  # of 11 MiB of text and 22 MiB of tokens


# ---- bad input ----------------------------------------------------------------------------------


def fails(match: str, source: Path, store: BlobStore, **options: object) -> None:
    with pytest.raises(DataError, match=match) as caught:
        build_corpus(source, store, **({"sequence_length": 8} | options))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert list(store.scratch.iterdir()) == []


def test_a_missing_or_empty_source_is_named(tmp_path: Path, store: BlobStore) -> None:
    fails("nowhere: no such file or folder; give the path", tmp_path / "nowhere", store)
    fails("the file is empty", write(tmp_path, {"e.txt": ""}) / "e.txt", store)
    (tmp_path / "void").mkdir()
    fails("no text in this folder", tmp_path / "void", store)
    os.mkfifo(tmp_path / "pipe")
    fails("not a file or folder", tmp_path / "pipe", store)


def test_text_that_is_not_utf8_is_named(tmp_path: Path, store: BlobStore) -> None:
    write(tmp_path / "t", {"bad.txt": b"fine\n" * 9999 + b"\xff\xfe", "good.txt": "x" * 99})
    fails(r"bad\.txt: not UTF-8 text; convert it", tmp_path / "t" / "bad.txt", store)
    fails(r"bad\.txt: not UTF-8", tmp_path / "t", store)


@pytest.mark.parametrize(
    "line",
    ['{"txt": "a"}', '["text"]', '{"text": 5}', '{"text": null}', "not json", '{"text": "a"', "7",
     '{"text": "\\ud800"}', "[" * 100_000],
)  # fmt: skip
def test_a_bad_jsonl_line_is_named(tmp_path: Path, store: BlobStore, line: str) -> None:
    source = write(tmp_path, {"d.jsonl": f'{{"text": "ok"}}\n\n{line}\n'}) / "d.jsonl"
    fails(r'd\.jsonl: line 3 is not a JSON object with a string "text"', source, store)


def test_an_endless_jsonl_line_is_not_read(
    tmp_path: Path, store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "MAX_LINE_BYTES", 1 << 20)
    source = write(tmp_path, {"d.jsonl": '{"text": "' + "x" * (1 << 20) + '"}'}) / "d.jsonl"
    fails("line 1 is longer than 1 MiB; split it", source, store)


@pytest.mark.parametrize("num_tokens", [1, 8, 9, 17])
def test_too_few_tokens_are_counted(tmp_path: Path, store: BlobStore, num_tokens: int) -> None:
    source = write(tmp_path, {"a.txt": "a" * num_tokens}) / "a.txt"
    fails(f"{num_tokens} tokens are too few .* give more text or a shorter", source, store)


def test_just_enough_tokens_make_one_sequence_each(tmp_path: Path, store: BlobStore) -> None:
    source = write(tmp_path, {"a.txt": "a" * 18}) / "a.txt"
    built = build_corpus(source, store, sequence_length=8)
    assert (built.train.num_tokens, built.validation.num_tokens) == (9, 9)


@pytest.mark.parametrize(
    ("encode", "wrong"), [(lambda text: [99, 100], 100), (lambda text: [5, -1], -1)]
)
def test_a_token_that_the_model_lacks_is_named(
    tmp_path: Path, store: BlobStore, encode: Callable[[str], list[int]], wrong: int
) -> None:
    source = write(tmp_path, {"a.txt": "text"}) / "a.txt"
    fails(f"token id {wrong} does not fit .* of 100;", source, store, vocab_size=100, encode=encode)


def test_a_full_disk_is_a_clear_error(tmp_path: Path, store: BlobStore) -> None:
    source = write(tmp_path, {"a.txt": "words " * 100_000}) / "a.txt"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(SwarmError, match=r"cannot write tokens .* free some space") as caught:
            build_corpus(source, store, sequence_length=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not isinstance(caught.value, DataError)
    assert list(store.scratch.iterdir()) == []


def test_a_reader_cannot_be_led_astray_by_a_wrong_hash(store: BlobStore) -> None:
    index = TokenIndex("uint16", 5, 5, (BlobRef("0" * 64, 10),))
    with pytest.raises(SwarmError, match="chunk 0 cannot be read"):
        TokenReader(index, partial(blob_path, store.root)).read((0,), 4)
