"""The blob store: whole or absent, checked, bounded."""

import hashlib
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from swarmnode.domain import BlobRef
from swarmnode.errors import ChunkError, SwarmError
from swarmnode.p2p import blob_store
from swarmnode.p2p.blob_store import BORROWED_S, BlobStore, Range, blob_path
from swarmnode.wire import MAX_BLOB_BYTES


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 4096])
def test_what_is_put_is_read_back_and_survives_a_restart(
    tmp_path: Path, durable: bool, data: bytes
) -> None:
    store = BlobStore(tmp_path, durable=durable)
    ref = store.put(bytearray(data))
    assert ref == BlobRef(hashlib.sha256(data).hexdigest(), len(data))
    assert store.put(memoryview(data)) == ref
    again = BlobStore(tmp_path)
    assert again.has(ref)
    assert again.read(ref) == data
    assert blob_path(tmp_path, ref).read_bytes() == data
    again.remove(ref)
    assert not again.has(ref)
    again.remove(ref)


def test_a_blob_that_is_absent_or_of_another_size_is_not_here(store: BlobStore) -> None:
    ref = store.put(b"data")
    for other in (BlobRef("0" * 64, 4), BlobRef(ref.sha256, 3), BlobRef(ref.sha256, 5)):
        assert not store.has(other)
    with pytest.raises(ChunkError, match="not here"):
        store.read(BlobRef("0" * 64, 4))
    with pytest.raises(ChunkError, match="not here"):
        store.own([BlobRef("0" * 64, 4)])


@pytest.mark.parametrize("damage", [b"daTa", b"dat", b"", b"data and more"])
def test_a_corrupt_blob_is_removed_so_that_it_is_fetched_again(
    store: BlobStore, damage: bytes
) -> None:
    ref = store.put(b"data")
    blob_path(store.root, ref).write_bytes(damage)
    with pytest.raises(ChunkError, match="corrupt on disk and is removed"):
        store.read(ref)
    assert not store.has(ref)
    store.put(b"data")
    assert store.read(ref) == b"data"


def test_putting_again_repairs_a_corrupt_blob(store: BlobStore) -> None:
    ref = store.put(b"data")
    blob_path(store.root, ref).write_bytes(b"XXXX")
    store.put(b"data")
    assert store.read(ref) == b"data"


def test_what_is_borrowed_goes_again_unless_somebody_needs_it(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    before = store.put(b"before")
    names = (b"before", b"plain", b"put", b"owned", b"removed")
    refs = [store.put(name, is_borrowed=True) for name in names]
    assert store.put(b"put") == refs[2]
    store.own([refs[3]])
    store.own(refs[4:])
    store.remove(refs[4])
    assert store.has(refs[4]), "it is borrowed still"
    store.put(b"removed")
    store.give_back(refs)
    assert [store.has(ref) for ref in refs] == [True, False, True, True, True]
    assert store.read(before) == b"before"
    store.give_back(refs)
    assert store.has(refs[2])


def test_what_was_borrowed_long_ago_is_gone_at_the_next_start(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    old, young = (store.put(name, is_borrowed=True) for name in (b"old", b"young"))
    (path,) = (p for p in tmp_path.rglob(old.sha256) if p.is_file())
    os.utime(path, (0, time.time() - BORROWED_S - 1))
    again = BlobStore(tmp_path)
    assert (again.has(old), again.has(young)) == (False, True)
    again.give_back([young])
    assert not again.has(young)


def test_a_blob_over_the_limit_is_refused(store: BlobStore) -> None:
    store.put(bytes(MAX_BLOB_BYTES))
    with pytest.raises(SwarmError, match="at most"):
        store.put(bytes(MAX_BLOB_BYTES + 1))


@pytest.mark.parametrize(
    "ref", [BlobRef("../x", 1), BlobRef("A" * 64, 1), BlobRef("0" * 64, -1), BlobRef("", 0),
            BlobRef("0" * 64 + "\n", 1), BlobRef("0" * 64, MAX_BLOB_BYTES + 1)],
)  # fmt: skip
def test_only_a_hash_names_a_blob(store: BlobStore, ref: BlobRef) -> None:
    for act in (store.read, store.has, store.remove):
        with pytest.raises(ChunkError, match="names no blob"):
            act(ref)


def test_what_was_half_written_is_gone_at_the_next_start(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    (store.scratch / "leftover").write_bytes(b"half")
    ref = store.put(b"whole")
    again = BlobStore(tmp_path)
    assert list(again.scratch.iterdir()) == []
    assert again.read(ref) == b"whole"


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(store: BlobStore) -> None:
    data = os.urandom(200_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(SwarmError, match=r"cannot store 200000 bytes .* free some space"):
            store.put(data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path for path in store.root.rglob("*") if path.is_file()] == []
    assert store.read(store.put(data)) == data


def test_a_store_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SwarmError, match="cannot be used"):
        BlobStore(tmp_path / "file")


def test_threads_may_put_the_same_blob_at_once(store: BlobStore) -> None:
    data = os.urandom(100_000)
    start = threading.Barrier(4)

    def put() -> None:
        start.wait()
        for _ in range(20):
            store.put(data)

    threads = [threading.Thread(target=put) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.read(store.put(data)) == data
    assert list(store.scratch.iterdir()) == []


# ---- what need not be read again ----------------------------------------------------------------


@pytest.fixture
def read_paths(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read, in order."""
    seen, real = list[Path](), blob_store._read_piece

    def read_piece(piece: Range, *, is_whole: bool) -> bytes:
        data = real(piece, is_whole=is_whole)
        seen.append(piece.path)
        return data

    monkeypatch.setattr(blob_store, "_read_piece", read_piece)
    return seen


@pytest.mark.parametrize("is_borrowed", [False, True])
def test_what_was_written_or_read_in_this_life_is_known_to_be_sound(
    store: BlobStore, read_paths: list[Path], is_borrowed: bool
) -> None:
    ref = store.put(b"data", is_borrowed=is_borrowed)
    assert store.is_sound(ref)
    assert not read_paths
    again = BlobStore(store.root)
    assert again.is_sound(ref)
    assert len(read_paths) == 1, "what an earlier life wrote is looked at once"
    assert again.is_sound(ref)
    assert len(read_paths) == 1
    assert not again.is_sound(BlobRef(ref.sha256, 3))
    assert not again.is_sound(BlobRef("../x", 3))


CHANGES: dict[str, Callable[[BlobStore, BlobRef], object]] = {
    "removed": lambda store, ref: store.remove(ref),
    "gone": lambda store, ref: blob_path(store.root, ref).unlink(),
    "written to": lambda store, ref: blob_path(store.root, ref).write_bytes(b"daTa"),
    "shorter": lambda store, ref: os.truncate(blob_path(store.root, ref), 3),
    "replaced": lambda store, ref: os.replace(
        blob_path(store.root, store.put(b"daTa")), blob_path(store.root, ref)
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_since_is_known_no_more(store: BlobStore, name: str) -> None:
    ref = store.put(b"data")
    assert store.is_sound(ref)
    CHANGES[name](store, ref)
    assert not store.is_sound(ref)
    assert not store.has(ref)
    store.put(b"data")
    assert store.is_sound(ref)


def test_what_a_read_finds_damaged_is_known_no_more(store: BlobStore) -> None:
    ref = store.put(b"data")
    path = blob_path(store.root, ref)
    found = path.stat()
    path.write_bytes(b"daTa")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))  # as a disk that forgets
    assert store.is_sound(ref), "nobody has looked"
    with pytest.raises(ChunkError, match="is removed"):
        store.read(ref)
    assert not store.is_sound(ref)


def test_what_is_given_back_or_a_piece_of_another_file_is_read(
    tmp_path: Path, store: BlobStore, read_paths: list[Path]
) -> None:
    source = tmp_path / "weights"
    source.write_bytes(b"piece")
    (piece,) = pieces(source, 1000)
    assert store.put(b"piece", is_borrowed=True) == piece.ref
    store.add_ranges([piece])
    assert store.is_sound(piece.ref)
    store.give_back([piece.ref])
    assert store.is_sound(piece.ref)
    assert store.is_sound(piece.ref)
    assert read_paths == [source, source]


# ---- ranges of files that belong to others ------------------------------------------------------


def pieces(source: Path, size: int) -> list[Range]:
    data = source.read_bytes()
    return [
        Range(BlobRef(hashlib.sha256(piece).hexdigest(), len(piece)), source, offset)
        for offset in range(0, len(data), size)
        for piece in (data[offset : offset + size],)
    ]


def test_ranges_of_a_file_are_blobs_without_a_copy(tmp_path: Path, store: BlobStore) -> None:
    data = os.urandom(2500)
    source = tmp_path / "weights"
    source.write_bytes(data)
    ranges = pieces(source, 1000)
    store.add_ranges(ranges)
    refs = [piece.ref for piece in ranges]
    assert [ref.num_bytes for ref in refs] == [1000, 1000, 500]
    assert all(store.has(ref) for ref in refs)
    assert b"".join(store.read(ref) for ref in refs) == data
    assert not any(blob_path(store.root, ref).exists() for ref in refs)
    store.own(refs[1:2])
    assert blob_path(store.root, refs[1]).read_bytes() == data[1000:2000]


def test_a_source_that_changes_loses_its_blobs(tmp_path: Path, store: BlobStore) -> None:
    source = tmp_path / "weights"
    source.write_bytes(b"a" * 1000 + b"b" * 1000)
    first, second = pieces(source, 1000)
    store.add_ranges([first, second])
    source.write_bytes(b"a" * 1000 + b"c" * 1000)
    with pytest.raises(ChunkError, match="corrupt"):
        store.read(second.ref)
    assert not store.has(second.ref)
    assert store.read(first.ref) == b"a" * 1000
    source.unlink()
    assert not store.has(first.ref)


def test_dropped_ranges_are_gone_and_their_file_stays(tmp_path: Path, store: BlobStore) -> None:
    source = tmp_path / "weights"
    source.write_bytes(os.urandom(2000))
    ranges = pieces(source, 1000)
    store.add_ranges(ranges)
    store.drop_ranges(source)
    assert not any(store.has(piece.ref) for piece in ranges)
    assert source.stat().st_size == 2000


def test_content_is_here_as_long_as_one_file_has_it(tmp_path: Path, store: BlobStore) -> None:
    data = os.urandom(2000)
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        path.write_bytes(data)
        store.add_ranges(pieces(path, 1000))
    refs = [piece.ref for piece in pieces(first, 1000)]
    store.drop_ranges(second)
    second.unlink()
    assert b"".join(store.read(ref) for ref in refs) == data
    second.write_bytes(data)
    store.add_ranges(pieces(second, 1000))
    first.write_bytes(bytes(2000))
    assert b"".join(store.read(ref) for ref in refs) == data
    second.unlink()
    assert not any(store.has(ref) for ref in refs)


def test_an_own_copy_that_is_removed_leaves_the_pieces_of_files(
    tmp_path: Path, store: BlobStore
) -> None:
    source = tmp_path / "weights"
    source.write_bytes(os.urandom(1000))
    (piece,) = pieces(source, 1000)
    store.add_ranges([piece])
    store.own([piece.ref])
    store.remove(piece.ref)
    assert not blob_path(store.root, piece.ref).exists()
    assert store.read(piece.ref) == source.read_bytes()


def test_what_could_not_be_owned_is_borrowed_still(tmp_path: Path, store: BlobStore) -> None:
    source = tmp_path / "weights"
    source.write_bytes(os.urandom(200_000))
    (piece,) = pieces(source, 200_000)
    store.add_ranges([piece])
    borrowed = store.put(b"borrowed", is_borrowed=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(SwarmError, match="free some space"):
            store.own([borrowed, piece.ref])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    store.give_back([borrowed, piece.ref])
    assert not store.has(borrowed)
    assert store.has(piece.ref), "the file is somebody else's"


def test_what_is_only_borrowed_need_not_outlast_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, synced = os.fsync, set[str]()

    def fsync(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    store = BlobStore(tmp_path, durable=True)
    assert synced == {str(tmp_path.resolve())}, "of an earlier life there may be folders"
    synced.clear()
    refs = [store.put(name, is_borrowed=True) for name in (b"put", b"owned", b"neither")]
    assert not synced
    store.put(b"put")
    store.own(refs[1:2])
    kept = {blob_path(store.root, ref) for ref in refs[:2]}
    folders = (store.root, *(path.parent for path in kept))
    assert synced == {str(path.resolve()) for path in (*kept, *folders)}
    synced.clear()
    store.remove(refs[0])
    store.put(b"put")
    assert str(store.root.resolve()) not in synced, "its folder is there"
