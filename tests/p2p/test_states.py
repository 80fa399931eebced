"""Tensors as chunks: the index survives the trip, hostile ones do not, files come back whole."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmnode.domain import BlobRef
from swarmnode.errors import ChunkError, DataError, ProtocolError
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.states import IndexedTensor, TensorIndex, index_tensors, write_safetensors
from swarmnode.tensorfiles import ITEM_BYTES, check_data, read_bytes, read_header
from swarmnode.wire import CHUNK_BYTES

HASH = "ab" * 32


@st.composite
def tensors(draw: st.DrawFn) -> IndexedTensor:
    """A tensor whose chunks add up to its shape."""
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    shape = tuple(draw(st.lists(st.integers(0, 40), max_size=4)))
    left = ITEM_BYTES[dtype]
    for dimension in shape:
        left *= dimension
    chunks = []
    while left:
        num_bytes = min(left, draw(st.integers(1, CHUNK_BYTES)) if len(chunks) < 3 else CHUNK_BYTES)
        digest = draw(st.text("0123456789abcdef", min_size=64, max_size=64))
        chunks.append(BlobRef(digest, num_bytes))
        left -= num_bytes
    name = draw(st.text(min_size=1, max_size=20))
    return IndexedTensor(name, dtype, shape, tuple(chunks))


indexes = st.builds(
    TensorIndex,
    st.integers(0, 1 << 62),
    st.lists(tensors(), max_size=4, unique_by=lambda tensor: tensor.name).map(tuple),
)


@settings(max_examples=60, deadline=None)
@given(indexes)
def test_an_index_survives_the_trip(index: TensorIndex) -> None:
    assert TensorIndex.from_json(index.to_json()) == index


def row(**changes: Any) -> list[Any]:
    """One good row of an index, or a bad one."""
    good = {"name": "w", "dtype": "F32", "shape": [2, 3], "chunks": [[HASH, 24]]}
    return list({**good, **changes}.values())


def index_of(*rows: object, step: object = 0) -> bytes:
    return json.dumps({"step": step, "tensors": list(rows)}).encode()


def test_the_good_row_of_these_tests_is_good() -> None:
    index = TensorIndex.from_json(index_of(row()))
    assert index == TensorIndex(0, (IndexedTensor("w", "F32", (2, 3), (BlobRef(HASH, 24),)),))
    assert index.tensors[0].num_bytes == 24


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"{",
        b"[" * 100_000,
        b'{"step": 0, "tensors": ' + b"9" * 5000 + b"}",
        b"null",
        b"[]",
        b"{}",
        b'{"step": 0}',
        b'{"tensors": []}',
        b'{"step": 0, "tensors": null}',
        b'{"step": 0, "tensors": {"wxyz": 1}}',
        index_of(step=-1),
        index_of(step=0.0),
        index_of(step=True),
        index_of(step="0"),
        index_of(step=float("nan")),
        index_of(None),
        index_of([]),
        index_of([*row(), 1]),
        index_of(row(), row()),
        index_of(row(name="")),
        index_of(row(name="x" * 513)),
        index_of(row(name=7)),
        index_of(row(dtype="F8")),
        index_of(row(dtype=None)),
        index_of(row(dtype=[])),
        index_of(row(shape=[3, 3])),
        index_of(row(shape=[-2, -3])),
        index_of(row(shape=[2.5])),
        index_of(row(shape=[1 << 48, 0])),
        index_of(row(shape=[1] * 8 + [6])),
        index_of(row(shape=6)),
        index_of(row(chunks=[])),
        index_of(row(chunks=[[HASH, 23]])),
        index_of(row(chunks=[[HASH, 24], [HASH, 0]])),
        index_of(row(chunks=[[HASH, 25], [HASH, -1]])),
        index_of(row(chunks=[[HASH[1:], 24]])),
        index_of(row(chunks=[[HASH]])),
        index_of(row(chunks=[[None, 24]])),
        index_of(row(chunks=["ab"])),
        index_of(row(chunks=None)),
        index_of(row(shape=[CHUNK_BYTES, 2], chunks=[[HASH, 8 * CHUNK_BYTES]])),
    ],
    ids=lambda data: repr(data[:60]),
)
def test_what_is_no_index_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        TensorIndex.from_json(data)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(anything, st.integers(0, 3))
def test_any_json_is_an_index_or_refused(value: object, field: int) -> None:
    changed = row()
    changed[field] = value
    for data in (
        json.dumps(value).encode(),
        index_of(value),
        index_of(changed),
        json.dumps({"step": 0, "tensors": value}).encode(),
        index_of(row(), step=value),
    ):
        try:
            index = TensorIndex.from_json(data)
        except ProtocolError:
            continue
        assert TensorIndex.from_json(index.to_json()) == index


@settings(max_examples=100, deadline=None)
@given(indexes, st.data())
def test_a_damaged_index_is_an_index_or_refused(index: TensorIndex, data: st.DataObject) -> None:
    packed = bytearray(index.to_json())
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        again = TensorIndex.from_json(bytes(packed))
    except ProtocolError:
        return
    assert isinstance(again, TensorIndex)


def test_a_chunk_that_no_hash_names_is_refused() -> None:
    with pytest.raises(ProtocolError):
        TensorIndex.from_json(index_of(row(chunks=[["/" * 64, 24]])))


def test_a_name_that_is_no_hash_never_becomes_a_path(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs")
    for name in ("/" * 64, "../" * 21 + "x", "AB" * 32):
        with pytest.raises(ChunkError):
            store.read(BlobRef(name, 24))


# ---- picking -----------------------------------------------------------------------------------


def test_picking_keeps_the_step_and_the_order_and_chunks_come_once() -> None:
    first, second, third = (BlobRef(str(digit) * 64, 4) for digit in range(3))
    rows = (
        IndexedTensor("b", "F32", (2,), (second, first)),
        IndexedTensor("a", "F32", (1,), (first,)),
        IndexedTensor("c", "F32", (2,), (third, third)),
    )
    index = TensorIndex(5, rows)
    assert index.chunks() == (second, first, third)
    assert index.pick(lambda name: name != "b") == TensorIndex(5, rows[1:])
    assert index.pick(lambda _: False).chunks() == ()


# ---- files -------------------------------------------------------------------------------------

CONTENTS = {
    "empty": ("F32", (0, 3), b""),
    "scalar": ("I64", (), b"12345678"),
    "layers.0.weight": ("BF16", (3, 5), bytes(range(30))),
    "large": ("U8", (CHUNK_BYTES * 2 + 7,), bytes(CHUNK_BYTES) + b"x" * CHUNK_BYTES + b"7 bytes"),
}


def publish(store: BlobStore) -> TensorIndex:
    """The tensors above as chunks in a store."""
    rows = []
    for name, (dtype, shape, data) in CONTENTS.items():
        pieces = [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]
        rows.append(IndexedTensor(name, dtype, shape, tuple(store.put(p) for p in pieces)))
    return TensorIndex.from_json(TensorIndex(3, tuple(rows)).to_json())


def test_a_file_is_written_back_and_indexed_to_the_same_chunks(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs")
    index = publish(store)
    path = tmp_path / "state.safetensors"
    write_safetensors(path, index.tensors, store.read)
    spans = read_header(path)
    assert {
        name: (span.dtype, span.shape, bytes(read_bytes(span))) for name, span in spans.items()
    } == CONTENTS
    again, ranges = index_tensors(spans, 3)
    assert {t.name: t for t in again.tensors} == {t.name: t for t in index.tensors}
    served = BlobStore(tmp_path / "other")
    served.add_ranges(ranges)
    for chunk in index.chunks():
        assert hashlib.sha256(served.read(chunk)).hexdigest() == chunk.sha256
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["state.safetensors"]


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs")
    index = publish(store)
    path = tmp_path / "state.safetensors"
    write_safetensors(path, index.tensors, store.read)
    seen: list[int] = []
    index_tensors(read_header(path), 3, seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == sum(tensor.num_bytes for tensor in index.tensors)


def test_a_missing_chunk_leaves_neither_file_nor_half_a_file(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs")
    index = publish(store)
    store.remove(index.tensors[-1].chunks[-1])
    path = tmp_path / "state.safetensors"
    path.write_bytes(b"earlier")
    with pytest.raises(ChunkError):
        write_safetensors(path, index.tensors, store.read)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["state.safetensors"]
    assert path.read_bytes() == b"earlier"


def test_two_may_write_the_same_file_at_once_and_no_half_of_it_is_seen(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs")
    index = publish(store)
    path, once = tmp_path / "state.safetensors", tmp_path / "once.safetensors"
    write_safetensors(once, index.tensors, store.read)

    def read_while_another_writes(ref: BlobRef) -> bytes:
        write_safetensors(path, index.tensors, store.read)
        assert path.read_bytes() == once.read_bytes()
        return store.read(ref)

    write_safetensors(path, index.tensors, read_while_another_writes)
    assert path.read_bytes() == once.read_bytes()
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {path.name, once.name}


def test_a_checkable_file_says_when_it_is_damaged_and_lies_as_any_other(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs")
    index = publish(store)
    path, plain = tmp_path / "state.safetensors", tmp_path / "plain.safetensors"
    write_safetensors(path, index.tensors, store.read, is_checkable=True)
    write_safetensors(plain, index.tensors, store.read)
    check_data(path)
    assert list(read_header(path)) == list(read_header(plain)) == [t.name for t in index.tensors]
    data, num_bytes = path.read_bytes(), sum(tensor.num_bytes for tensor in index.tensors)
    assert data.endswith(plain.read_bytes()[-num_bytes:])
    for at in (len(data) - num_bytes, len(data) - 1):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(DataError, match="is damaged"):
            check_data(path)


def test_a_file_that_became_shorter_is_noticed(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs")
    path = tmp_path / "state.safetensors"
    write_safetensors(path, publish(store).tensors, store.read)
    spans = read_header(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(ProtocolError, match="ended early"):
        index_tensors(spans, 3)
