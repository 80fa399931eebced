"""The update log: what is whole after a crash, what strangers may send as an index."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmnode.domain import BlobRef
from swarmnode.errors import DataError, ProtocolError
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.updates import UpdateIndex, index_update
from swarmnode.wire import CHUNK_BYTES
from swarmnode.worker.training.log import UpdateLog, newest_run


def content(step: int) -> bytes:
    return hashlib.sha256(str(step).encode()).digest() * 5


def filled(directory: Path, *steps: int) -> UpdateLog:
    log = UpdateLog(directory, durable=False)
    for step in steps:
        log.write(step, [content(step)])
    return log


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_an_update_is_its_bytes_however_they_are_cut() -> None:
    data = os.urandom(2 * CHUNK_BYTES + 5)
    whole = index_update(3, [data])
    pieces = index_update(3, [data[:7], b"", memoryview(data)[7 : CHUNK_BYTES + 1],
                              data[CHUNK_BYTES + 1 :]])  # fmt: skip
    assert whole == pieces
    assert [chunk.num_bytes for chunk in whole.chunks] == [CHUNK_BYTES, CHUNK_BYTES, 5]
    assert whole.chunks[1].sha256 == hashlib.sha256(data[CHUNK_BYTES : 2 * CHUNK_BYTES]).hexdigest()
    assert whole.num_bytes == len(data)
    assert index_update(4, [data]).ref != whole.ref, "the step is part of the name"
    assert UpdateIndex.from_json(whole.to_json()) == whole


@given(st.integers(0, 1 << 40), st.lists(st.binary(max_size=40), max_size=5))
def test_every_index_that_is_written_can_be_read(step: int, payloads: list[bytes]) -> None:
    index = index_update(step, payloads)
    assert UpdateIndex.from_json(index.to_json()) == index
    assert index.ref == BlobRef(hashlib.sha256(index.to_json()).hexdigest(), len(index.to_json()))


GOOD_ROW = ["a" * 64, 5]
FULL_ROW = ["b" * 64, CHUNK_BYTES]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[1]",
        b"[" * 50_000,
        b"\xff",
        {"step": 1},
        {"chunks": []},
        {"step": -1, "chunks": []},
        {"step": True, "chunks": []},
        {"step": 1.0, "chunks": []},
        {"step": 1 << 62, "chunks": []},
        {"step": 1, "chunks": [["a" * 63, 5]]},
        {"step": 1, "chunks": [["A" * 64, 5]]},
        {"step": 1, "chunks": [["a" * 64, 0]]},
        {"step": 1, "chunks": [["a" * 64, CHUNK_BYTES + 1]]},
        {"step": 1, "chunks": [GOOD_ROW, FULL_ROW]},
        {"step": 1, "chunks": [["a" * 64, 5, 6]]},
        {"step": 1, "chunks": [["a" * 64, True]]},
        {"step": 1, "chunks": ["ab"]},
        {"step": 1, "chunks": [], "more": 1},
        b'{"step":1, "chunks":[]}',
        b'{"chunks":[],"step":1}',
        b'{"step":1,"step":1,"chunks":[]}',
    ],
)
def test_an_index_that_was_not_written_by_us_is_refused(raw: object) -> None:
    data = raw if isinstance(raw, bytes) else json.dumps(raw, separators=(",", ":")).encode()
    with pytest.raises(ProtocolError):
        UpdateIndex.from_json(data)
    assert UpdateIndex.from_json(b'{"step":1,"chunks":[]}') == UpdateIndex(1, ())


def test_what_was_written_is_found_again_and_served(tmp_path: Path) -> None:
    log = UpdateLog(tmp_path / "stage-0")
    refs = {step: log.write(step, [content(step), b"x"]) for step in (4, 5, 6)}
    assert log.inventory() == refs
    store = BlobStore(tmp_path / "blobs")
    store.add_ranges(log.ranges(5))
    index = UpdateIndex.from_json(store.read(refs[5]))
    assert b"".join(store.read(chunk) for chunk in index.chunks) == content(5) + b"x"
    assert refs[5] == log.read_index(5).ref
    with pytest.raises(DataError):
        log.ranges(7)


def test_a_durable_entry_has_its_folder_on_the_disk_whoever_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, synced, fsync = UpdateLog(tmp_path / "stage-0"), list[str](), os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    log.directory.mkdir()  # for a snapshot, say
    log.write(1, [content(1)])
    assert synced[-2:] == ["stage-0", tmp_path.name]
    log.write(2, [content(2)])
    assert synced.count(tmp_path.name) == 1


def test_an_entry_that_is_written_again_replaces_the_first(tmp_path: Path) -> None:
    log = filled(tmp_path, 1)
    assert log.write(1, [b"other"]) == index_update(1, [b"other"]).ref
    assert log.inventory() == {1: index_update(1, [b"other"]).ref}


DAMAGE = {
    "no index": lambda d: (d / "6.index").unlink(),
    "no update": lambda d: (d / "6.update").unlink(),
    "half an update": lambda d: os.truncate(d / "6.update", 80),
    "half an index": lambda d: os.truncate(d / "6.index", 30),
    "an empty index": lambda d: os.truncate(d / "6.index", 0),
    "a longer update": lambda d: (d / "6.update").write_bytes(content(6) + b"x"),
    "a flipped byte": lambda d: (d / "6.update").write_bytes(content(6)[:-1] + b"?"),
    "another step's update": lambda d: (d / "6.update").write_bytes(content(5)),
    "another step's entry": lambda d: [
        (d / f"6.{kind}").write_bytes((d / f"5.{kind}").read_bytes())
        for kind in ("index", "update")
    ],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_entry_is_discarded_and_removed(name: str, tmp_path: Path) -> None:
    log = filled(tmp_path, 4, 5, 6)
    assert list(log.inventory()) == [4, 5, 6], "whole before the damage"
    DAMAGE[name](tmp_path)
    assert list(log.inventory()) == [4, 5]
    assert names(tmp_path) == {"4.update", "4.index", "5.update", "5.index"}


def test_what_lies_before_a_gap_is_removed_with_what_was_half_written(tmp_path: Path) -> None:
    log = filled(tmp_path, 1, 2, 4, 5)
    for name in ("6.update.partial", "6.update.0a1b2c3d.partial", "0.ready.0a1b2c3d.partial"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "3.safetensors").write_bytes(b"not ours")
    assert list(log.inventory()) == [4, 5]
    assert names(tmp_path) == {"4.update", "4.index", "5.update", "5.index", "3.safetensors"}


def test_what_slots_said_last_outlives_the_process_unless_it_is_damaged(tmp_path: Path) -> None:
    log = filled(tmp_path, 1)
    for slot, said in ((0, b"first"), (1, b"other"), (0, b"last")):
        log.write_ready(slot, said)
    assert UpdateLog(tmp_path).readies() == [b"last", b"other"]
    path = tmp_path / "0.ready"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert log.readies() == [b"other"]
    assert list(log.inventory()) == [1], "the log itself does not mind"
    log.forget_readies()
    assert log.readies() == []
    (tmp_path / "0.ready").mkdir()  # as an error of the disk
    with pytest.raises(DataError, match="free some space"):
        log.write_ready(0, b"lost")


def test_a_full_disk_leaves_no_entry(tmp_path: Path) -> None:
    log = filled(tmp_path, 1)
    (tmp_path / "2.update").mkdir()  # as an error of the disk
    with pytest.raises(DataError, match="cannot log step 2"):
        log.write(2, [b"x"])
    (tmp_path / "2.update").rmdir()
    assert list(log.inventory()) == [1]
    assert names(tmp_path) == {"1.update", "1.index"}


class _Meanwhile(list[bytes]):
    """Payloads between which something else happens while they are written."""

    def __init__(self, payloads: list[bytes], happens: Callable[[], object]) -> None:
        super().__init__(payloads)
        self._happens = happens
        self._num_passes = 0

    def __iter__(self) -> Iterator[bytes]:
        self._num_passes += 1
        for payload in list(super().__iter__()):
            yield payload
            if self._num_passes == 2:  # the first pass is for the hash
                self._happens()


def test_two_may_log_the_same_step_at_once_and_no_half_of_it_is_seen(tmp_path: Path) -> None:
    """The process that computes writes a step while it is fetched here."""
    log, payloads, seen = filled(tmp_path), [content(1), content(2)], []

    def another_writes_it() -> None:
        filled(tmp_path).write(1, payloads)
        seen.append((tmp_path / "1.update").read_bytes())

    ref = log.write(1, _Meanwhile(payloads, another_writes_it))
    assert seen == [content(1) + content(2)] * 2
    assert log.inventory() == {1: ref}
    assert names(tmp_path) == {"1.update", "1.index"}


@pytest.mark.parametrize(
    ("steps", "run"), [([], []), ([3], [3]), ([1, 2, 3], [1, 2, 3]), ([1, 3, 4], [3, 4])]
)
def test_the_newest_run_has_no_gap(steps: list[int], run: list[int]) -> None:
    assert newest_run(steps) == run
