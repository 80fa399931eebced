"""The reader of safetensors headers against the library, and against hostile files."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from swarmnode.errors import DataError
from swarmnode.tensorfiles import (
    INDEX_NAME,
    MAX_HEADER_BYTES,
    check_data,
    read_bytes,
    read_header,
)
from swarmnode.worker.models import save_tensors

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.arange(5, dtype=torch.int64),
    "c": torch.ones(2, 2, dtype=torch.bfloat16),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 7),
}
GOOD = save(TENSORS, metadata={"format": "pt"})


def stored(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def crafted(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_spans_are_where_the_library_put_the_tensors(tmp_path: Path) -> None:
    spans = read_header(stored(tmp_path / "x.safetensors", GOOD))
    assert spans.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert spans[name].shape == tuple(tensor.shape)
        raw = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.zeros(0)
        assert bytes(read_bytes(spans[name])) == bytes(raw.to(torch.uint8).tolist())


HOSTILE = {
    "nothing": b"",
    "seven bytes": bytes(7),
    "a header longer than the file": (1 << 40).to_bytes(8, "little") + b"{}",
    "a negative looking length": b"\xff" * 8 + b"{}",
    "not JSON": crafted(b"{]"),
    "not UTF-8": crafted(b'{"\xff": 1}'),
    "not an object": crafted([1, 2]),
    "deep nesting": crafted(b"[" * 200_000),
    "not a number": crafted(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 0]}}'),
    "a repeated name": crafted(
        b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]},'
        b' "a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'
    ),
    "an unknown dtype": crafted({"a": entry(dtype="F128")}, bytes(8)),
    "a dtype that is a list": crafted({"a": entry(dtype=["F32"])}, bytes(8)),
    "a negative size": crafted({"a": entry(shape=[-2])}, bytes(8)),
    "a boolean size": crafted({"a": entry(shape=[True, 2])}, bytes(8)),
    "a fractional size": crafted({"a": entry(shape=[2.0])}, bytes(8)),
    "a huge size": crafted({"a": entry(shape=[1 << 60, 1 << 60])}, bytes(8)),
    "too many dimensions": crafted({"a": entry(shape=[1] * 8 + [2])}, bytes(8)),
    "offsets that disagree with the shape": crafted({"a": entry(shape=[3])}, bytes(8)),
    "offsets behind the end": crafted({"a": entry(offsets=[8, 16])}, bytes(8)),
    "offsets backwards": crafted({"a": entry(offsets=[8, 0])}, bytes(8)),
    "three offsets": crafted({"a": entry(offsets=[0, 8, 8])}, bytes(8)),
    "a negative offset": crafted({"a": entry(offsets=[-8, 0])}, bytes(8)),
    "overlapping tensors": crafted({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
    "the same bytes twice": crafted({"a": entry(), "b": entry()}, bytes(8)),
    "a hole": crafted({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)),
    "bytes left over": crafted({"a": entry()}, bytes(9)),
    "bytes missing": crafted({"a": entry()}, bytes(7)),
    "an extra key": crafted({"a": {**entry(), "x": 1}}, bytes(8)),
    "a missing key": crafted({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "an entry that is a list": crafted({"a": [1]}, bytes(8)),
    "a nameless tensor": crafted({"": entry()}, bytes(8)),
    "a name with a line break": crafted({"a\nb": entry()}, bytes(8)),
    "a long name": crafted({"a" * 600: entry()}, bytes(8)),
    "metadata that is a number": crafted({"__metadata__": 1, "a": entry()}, bytes(8)),
    "metadata of numbers": crafted({"__metadata__": {"x": 1}, "a": entry()}, bytes(8)),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_refused(what: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.safetensors") as caught:
        read_header(stored(tmp_path / "x.safetensors", HOSTILE[what]))
    assert "\n" not in str(caught.value)


def test_a_header_over_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES * 2)  # sparse: nothing is written
    with pytest.raises(DataError, match="over the limit"):
        read_header(path)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    edits=st.lists(
        st.tuples(
            st.sampled_from(["change", "delete", "insert"]),
            st.integers(0, len(GOOD) - 1),
            st.binary(min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_a_mutated_file_is_refused_or_read_as_the_library_reads_it(
    edits: list[tuple[str, int, bytes]], tmp_path: Path
) -> None:
    data = bytearray(GOOD)
    for kind, at, new in edits:
        if kind == "change":
            data[at : at + len(new)] = new
        elif kind == "delete":
            del data[at : at + len(new)]
        else:
            data[at:at] = new
    path = stored(tmp_path / "x.safetensors", bytes(data))
    try:
        spans = read_header(path)
    except DataError:
        return
    loaded = load(bytes(data))
    assert {n: s.shape for n, s in spans.items()} == {n: tuple(t.shape) for n, t in loaded.items()}
    for span in spans.values():
        assert span.offset + span.num_bytes <= len(data)
        assert bytes(read_bytes(span)) == bytes(data[span.offset : span.offset + span.num_bytes])


def indexed(folder: Path, weight_map: Any) -> Path:
    stored(folder / "one.safetensors", save({"a": torch.ones(2)}))
    stored(folder / "two.safetensors", save({"b": torch.ones(3)}))
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_folder_is_read_by_its_index_or_file_by_file(tmp_path: Path) -> None:
    folder = indexed(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    by_index = read_header(folder)
    assert by_index["b"].file == folder / "two.safetensors"
    (folder / INDEX_NAME).unlink()
    assert read_header(folder) == by_index
    stored(folder / "three.safetensors", save({"a": torch.ones(1)}))
    with pytest.raises(DataError, match="in two files"):
        read_header(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "one.safetensors"} | {"b": "../two.safetensors"}, "outside its folder"),
        ({"a": "/etc/passwd"}, "outside its folder"),
        ({"a": "c:\\x.safetensors"}, "outside its folder"),
        ({"a": 3}, "outside its folder"),
        ({"a": "two.safetensors", "b": "two.safetensors"}, "which is not in"),
        ({"a": "one.safetensors", "c": "one.safetensors"}, "which is not in"),
        ({"b": "two.safetensors", "x": "one.safetensors"}, "does not place"),
        ({"a": "absent.safetensors"}, "cannot read"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ],
    ids=str,
)
def test_a_hostile_index_is_refused(weight_map: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_header(indexed(tmp_path, weight_map))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no safetensors file"):
        read_header(tmp_path)
    with pytest.raises(DataError, match="cannot read"):
        read_header(tmp_path / "absent.safetensors")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.safetensors")
        with pytest.raises(DataError, match="not a regular file"):
            read_header(tmp_path / "pipe.safetensors")


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = stored(tmp_path / "x.safetensors", GOOD)
    span = read_header(path)["a.weight"]
    os.truncate(path, span.offset + 4)
    with pytest.raises(DataError, match="ended early"):
        read_bytes(span)


def test_a_flipped_bit_in_a_file_that_we_wrote_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS)
    check_data(path)
    span, data = read_header(path)["b"], bytearray(path.read_bytes())
    data[span.offset] ^= 1
    with pytest.raises(DataError, match="is damaged"):
        check_data(stored(path, bytes(data)))
    check_data(stored(path, GOOD))  # of others: they say nothing, so nothing is wrong
