"""Samples: a pure map onto windows, each once per epoch, and the reader of their tokens."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmnode.domain import BlobRef
from swarmnode.errors import ChunkError, DataError
from swarmnode.tokens import TokenDtype, TokenIndex, full_chunk_tokens, token_dtype
from swarmnode.worker.training.samples import (
    SampleMap,
    TokenReader,
    chunks_needed,
    num_validation_microbatches,
    permute,
    validation_offsets,
)


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 1500), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(count: int, key: int) -> None:
    assert sorted(permute(place, count, key) for place in range(count)) == list(range(count))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**63 - 1),
    num_tokens=st.integers(20, 900),
    sequence_length=st.integers(2, 19),
    rows=st.integers(1, 7),
    num_microbatches=st.integers(1, 5),
)
def test_every_epoch_visits_every_window_once(
    seed: int, num_tokens: int, sequence_length: int, rows: int, num_microbatches: int
) -> None:
    samples = SampleMap(seed, num_tokens, sequence_length, rows, num_microbatches)
    count = samples.windows_per_epoch
    visited: list[int] = []
    step = 0
    while len(visited) < 2 * count:
        for microbatch in range(num_microbatches):
            visited += samples.sample_offsets(step, microbatch)
        step += 1
    every = [window * sequence_length for window in range(count)]
    assert sorted(visited[:count]) == every
    assert sorted(visited[count : 2 * count]) == every
    assert max(visited) + sequence_length + 1 <= num_tokens


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**63 - 1), num_lanes=st.integers(1, 4), num_windows=st.integers(4, 90))
def test_with_lanes_every_epoch_visits_the_same_windows_in_the_same_lane(
    seed: int, num_lanes: int, num_windows: int
) -> None:
    samples = SampleMap(seed, 10 * num_windows + 1, 10, 3, 2 * num_lanes, num_lanes)
    count = samples.windows_per_epoch
    assert count == num_windows // num_lanes
    visited: dict[int, list[int]] = {lane: [] for lane in range(num_lanes)}
    for step in range(count):
        for microbatch in range(2 * num_lanes):
            visited[microbatch % num_lanes] += samples.sample_offsets(step, microbatch)
    for lane, offsets in visited.items():
        own = [(window * num_lanes + lane) * 10 for window in range(count)]
        assert sorted(offsets[:count]) == sorted(offsets[count : 2 * count]) == own
    assert num_lanes > 1 or samples == SampleMap(seed, 10 * num_windows + 1, 10, 3, 2)


def test_lanes_need_a_window_each() -> None:
    with pytest.raises(DataError, match="21 tokens are too few for 3 pipelines"):
        SampleMap(0, 21, 10, 1, 3, 3)


def test_the_map_depends_on_the_seed_and_the_epoch_and_on_nothing_else() -> None:
    samples = SampleMap(1, 10_001, 10, 10, 10)
    first = samples.sample_offsets(3, 7)
    assert first == SampleMap(1, 10_001, 10, 10, 10).sample_offsets(3, 7)
    assert first != SampleMap(2, 10_001, 10, 10, 10).sample_offsets(3, 7)
    assert first != samples.sample_offsets(13, 7)
    assert SampleMap(1, 10_001, 10, 20, 5).sample_offsets(3, 3)[10:] == first


def test_the_map_never_changes_between_versions() -> None:
    samples = SampleMap(seed=0, num_tokens=1001, sequence_length=10, rows=4, num_microbatches=2)
    assert [samples.sample_offsets(0, 0), samples.sample_offsets(99, 1)] == FROZEN


FROZEN = [(280, 420, 740, 450), (560, 80, 580, 880)]


def test_the_order_looks_random() -> None:
    order = np.array([permute(place, 4096, key=5) for place in range(4096)])
    assert abs(np.corrcoef(order, np.arange(4096))[0, 1]) < 0.05
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
    assert np.count_nonzero(np.diff(order) == 1) < 10


def test_far_steps_and_huge_streams_need_no_table() -> None:
    samples = SampleMap(0, 10**15, 2048, 4, 4)
    offsets = samples.sample_offsets(10**9, 3)
    assert len(set(offsets)) == 4
    assert all(0 <= start <= 10**15 - 2049 and start % 2048 == 0 for start in offsets)


def test_too_few_tokens_say_what_to_do() -> None:
    with pytest.raises(DataError, match=r"10 tokens are fewer than one sequence.*give more text"):
        SampleMap(0, 10, 10, 1, 1)
    assert SampleMap(0, 11, 10, 3, 1).sample_offsets(0, 0) == (0, 0, 0)


def test_validation_windows_are_fixed_distinct_and_spread() -> None:
    num_microbatches = num_validation_microbatches(10_001, 10, 8, most=16)
    assert num_microbatches == 16
    windows = [
        start
        for microbatch in range(num_microbatches)
        for start in validation_offsets(10_001, 10, 8, num_microbatches, microbatch)
    ]
    assert len(set(windows)) == 128
    assert windows == sorted(windows)
    assert windows[0] == 0
    assert windows[-1] > 9_800


def test_a_small_validation_stream_still_fills_one_microbatch() -> None:
    assert num_validation_microbatches(25, 10, 8, most=16) == 1
    assert validation_offsets(25, 10, 8, 1, 0) == (0, 0, 0, 0, 10, 10, 10, 10)


# ---- reading ------------------------------------------------------------------------------------


def write_index(
    folder: Path, tokens: np.ndarray, dtype: TokenDtype, chunk_tokens: int
) -> TokenIndex:
    chunks = []
    for start in range(0, len(tokens), chunk_tokens):
        data = tokens[start : start + chunk_tokens].astype(dtype).tobytes()
        ref = BlobRef(hashlib.sha256(data).hexdigest(), len(data))
        (folder / ref.sha256).write_bytes(data)
        chunks.append(ref)
    return TokenIndex(dtype, chunk_tokens, len(tokens), tuple(chunks))


@pytest.mark.parametrize(("dtype", "top"), [("uint16", 1 << 16), ("uint32", 1 << 32)])
def test_the_reader_returns_the_tokens_across_chunks(
    tmp_path: Path, dtype: TokenDtype, top: int
) -> None:
    tokens = np.random.default_rng(0).integers(0, top, 1000, dtype=np.int64)
    index = write_index(tmp_path, tokens, dtype, chunk_tokens=7)
    reader = TokenReader(index, lambda ref: tmp_path / ref.sha256)
    offsets = (0, 5, 979, 500)
    rows = reader.read(offsets, 20)
    assert rows.dtype == np.int64
    assert rows.shape == (4, 21)
    for row, start in zip(rows, offsets, strict=True):
        assert row.tolist() == tokens[start : start + 21].tolist()


def test_only_the_needed_chunks_are_opened(tmp_path: Path) -> None:
    index = write_index(tmp_path, np.arange(1000), "uint16", chunk_tokens=10)
    opened: list[str] = []

    def path_of(ref: BlobRef) -> Path:
        opened.append(ref.sha256)
        return tmp_path / ref.sha256

    reader = TokenReader(index, path_of)
    offsets = (0, 95, 989)
    needed = chunks_needed(offsets, index, 10)
    assert needed == {0, 1, 9, 10, 98, 99}
    reader.read(offsets, 10)
    assert sorted(opened) == sorted(index.chunks[number].sha256 for number in needed)


def test_what_the_reader_cannot_serve_is_an_error(tmp_path: Path) -> None:
    index = write_index(tmp_path, np.arange(100), "uint16", chunk_tokens=50)
    reader = TokenReader(index, lambda ref: tmp_path / ref.sha256, vocab_size=90)
    assert reader.read((0,), 60).max() == 60
    for start in (-1, 90):
        with pytest.raises(DataError, match="not within"):
            reader.read((start,), 10)
    with pytest.raises(DataError, match="token id 99"):
        reader.read((89,), 10)
    reader = TokenReader(index, lambda ref: tmp_path / ref.sha256)
    (tmp_path / index.chunks[1].sha256).write_bytes(b"short")
    with pytest.raises(ChunkError, match="wrong size"):
        reader.read((80,), 10)
    (tmp_path / index.chunks[1].sha256).unlink()
    with pytest.raises(ChunkError, match="cannot be read"):
        reader.read((80,), 10)


# ---- the index ----------------------------------------------------------------------------------


def test_the_index_survives_its_canonical_form(tmp_path: Path) -> None:
    index = write_index(tmp_path, np.arange(1000), "uint16", chunk_tokens=7)
    assert TokenIndex.parse(index.canonical()) == index
    assert b" " not in index.canonical()
    empty = TokenIndex("uint32", 5, 0, ())
    assert TokenIndex.parse(empty.canonical()) == empty


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dtype", "int8"), ("dtype", 3), ("dtype", []), ("chunk_tokens", 0), ("chunk_tokens", True),
        ("chunk_tokens", 1 << 40), ("num_tokens", -1), ("num_tokens", 10**30), ("num_tokens", 1.0),
        ("num_tokens", 9), ("chunks", None), ("chunks", ["zz"]), ("chunks", []), ("format", "x"),
        ("chunks", ["A" * 64, "0" * 64]), ("more", 1),
    ],
)  # fmt: skip
def test_a_wrong_index_is_refused(key: str, value: object) -> None:
    body = {"chunk_tokens": 10, "chunks": ["0" * 64, "1" * 64], "dtype": "uint16",
            "format": "swarmnode-tokens-1", "num_tokens": 15}  # fmt: skip
    assert TokenIndex.parse(json.dumps(body).encode()).chunks[1].num_bytes == 10
    with pytest.raises(DataError, match="token index"):
        TokenIndex.parse(json.dumps(body | {key: value}).encode())


@given(st.binary(max_size=200))
def test_any_bytes_parse_to_an_error(data: bytes) -> None:
    with pytest.raises(DataError, match="token index"):
        TokenIndex.parse(data)


def test_the_dtype_follows_the_vocabulary() -> None:
    assert [token_dtype(size) for size in (1, 65536, 65537)] == ["uint16", "uint16", "uint32"]
    assert full_chunk_tokens("uint16") * 2 == full_chunk_tokens("uint32") * 4 == 1 << 20
