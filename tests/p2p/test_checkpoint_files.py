"""Checkpoints on disk: whole, or damaged and said so; exported completely, or not at all."""

import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import checkpoint_makers as make
import pytest

from swarmnode.domain import BlobRef
from swarmnode.errors import BusyError, ChunkError, DataError, NotFoundError, SwarmError
from swarmnode.p2p import checkpoint_files as files
from swarmnode.p2p.blob_store import BlobStore, blob_path
from swarmnode.p2p.checkpoint_files import Shelf, audit_folder, audit_shelf, write_folder
from swarmnode.p2p.checkpoints import Checkpoint
from swarmnode.p2p.states import IndexedTensor
from tests.tmpfs import tmpfs


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


@pytest.fixture
def shelf(store: BlobStore, tmp_path: Path) -> Shelf:
    """Two checkpoints, the second after the first."""
    made = Shelf(tmp_path / "checkpoints")
    first = make.checkpoint(store, 10)
    made.add(first)
    made.add(make.checkpoint(store, 20, parent=first.sha256))
    return made


@pytest.fixture
def folder(store: BlobStore, tmp_path: Path) -> Path:
    """A checkpoint that stands alone."""
    target = tmp_path / "alone"
    write_folder(target, make.checkpoint(store), store.read, make.tokenizer(tmp_path))
    return target


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# ---- the shelf ---------------------------------------------------------------------------------


def test_what_is_put_on_a_shelf_is_found_again_and_can_go(store: BlobStore, shelf: Shelf) -> None:
    assert shelf.steps() == (10, 20)
    assert shelf.load(20).manifest.parent == shelf.load(10).sha256
    shelf.keep_only([20])
    assert shelf.steps() == (20,)
    with pytest.raises(NotFoundError, match="after step 10; there are: 20"):
        shelf.load(10)


def test_a_whole_shelf_has_no_problems(store: BlobStore, shelf: Shelf) -> None:
    done: list[int] = []
    audits = audit_shelf(shelf, store.root, done.append)
    assert [(found.step, found.problems) for found in audits] == [(10, ()), (20, ())]
    assert audits[0].weights_sha256 == shelf.load(10).manifest.weights_sha256
    assert sum(done) == 2 * shelf.load(10).manifest.num_bytes


@pytest.mark.parametrize("damage", ["flipped", "shorter", "gone"])
def test_a_damaged_chunk_is_found_and_named(store: BlobStore, shelf: Shelf, damage: str) -> None:
    atom = next(a for a in shelf.load(20).manifest.atoms if a.name == "layers.0.w::exp_avg")
    path = blob_path(store.root, atom.chunks[1])
    if damage == "flipped":
        flip(path, 7)
    elif damage == "shorter":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    for found in audit_shelf(shelf, store.root):
        (problem,) = found.problems
        assert problem.startswith(
            f"layers.0.w::exp_avg: chunk 2 of 2 ({atom.chunks[1].sha256[:12]}"
        )
    assert path.exists() == (damage != "gone"), "an audit changes nothing"


def test_a_broken_chain_a_wrong_name_and_a_damaged_manifest_are_said(
    store: BlobStore, shelf: Shelf
) -> None:
    shelf.add(make.checkpoint(store, 30, parent="a" * 64))
    (shelf.folder / "40.json").write_bytes(make.checkpoint(store, 41).to_bytes())
    (shelf.folder / "50.json").write_bytes(b"{}")
    problems = {found.step: found.problems for found in audit_shelf(shelf, store.root)}
    assert problems[30] == ("it does not name the checkpoint before it as its parent",)
    assert "holds step 41" in problems[40][0]
    assert "not a checkpoint manifest" in problems[50][0]
    assert (problems[10], problems[20]) == ((), ())


def test_a_foreign_signature_and_a_wrong_hash_over_weights_are_said(
    store: BlobStore, shelf: Shelf
) -> None:
    whole = make.checkpoint(store, 30, parent=shelf.load(20).sha256)
    data = make.recoded(whole, ("loss",), 0.5)
    (shelf.folder / "30.json").write_bytes(data)
    assert (
        "signature is not that of its coordinator" in audit_shelf(shelf, store.root)[2].problems[0]
    )
    wrong = make.checkpoint(store, 30, parent=shelf.load(20).sha256, weights_sha256="0" * 64)
    shelf.add(wrong)
    (problem,) = audit_shelf(shelf, store.root)[2].problems
    assert "hash over all weights" in problem


def test_of_very_many_problems_the_first_are_said(
    store: BlobStore, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_PROBLEMS", 3)
    for ref in shelf.load(20).manifest.chunks:
        blob_path(store.root, ref).unlink()
    num_chunks = sum(len(atom.chunks) for atom in shelf.load(20).manifest.atoms)
    problems = audit_shelf(shelf, store.root)[1].problems
    assert len(problems) == 4
    assert problems[-1] == f"and {num_chunks - 3} more"


def test_a_manifest_of_impossible_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "1.json"
    with path.open("wb") as file:
        file.truncate(files.MAX_MANIFEST_BYTES + 1)
    tracemalloc.start()
    with pytest.raises(DataError, match="over 64 MiB"):
        files.read_checkpoint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


# ---- a folder that stands alone ----------------------------------------------------------------


def test_a_folder_stands_alone(store: BlobStore, folder: Path) -> None:
    for ref in make.checkpoint(store).manifest.chunks:
        store.remove(ref)
    names = {path.name for path in folder.iterdir()}
    expected = {"manifest.json", "atoms-00000.safetensors", "config.json", "tokenizer.json"}
    assert names == expected
    assert json.loads((folder / "config.json").read_text()) == make.CONFIG
    found = audit_folder(folder)
    assert found.problems == ()
    assert files.folder_weights_sha256(folder) == found.weights_sha256


def test_each_flipped_byte_of_a_folder_is_found(folder: Path) -> None:
    path = folder / "atoms-00000.safetensors"
    size = path.stat().st_size
    for at in range(size - 1, 0, -37):
        flip(path, at)
        assert audit_folder(folder).problems, at
        flip(path, at)
    assert audit_folder(folder).problems == ()


def test_other_damages_of_a_folder_are_found(folder: Path) -> None:
    (folder / "config.json").write_text('{"vocab_size": 301}')
    assert audit_folder(folder).problems == (
        "config.json is not the model's that the manifest names",
    )
    (folder / "atoms-00000.safetensors").rename(folder / "hidden")
    assert "holds no safetensors file" in audit_folder(folder).problems[0]
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="is it a checkpoint"):
        audit_folder(folder)


def test_atoms_of_one_weight_share_a_file_and_files_have_a_size(
    store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "GROUP_BYTES", 500)
    target = tmp_path / "alone"
    write_folder(target, make.checkpoint(store), store.read, {})
    groups = [files.read_header(path) for path in sorted(target.glob("atoms-*.safetensors"))]
    assert [sorted({name.partition("::")[0] for name in group}) for group in groups] == [
        ["embed.weight", "layers.0.w"],
        ["layers.1.w"],
    ]
    assert [len(group) for group in groups] == [6, 3]
    assert audit_folder(target).problems == ()


def test_one_chunk_at_a_time_is_in_memory(tmp_path: Path) -> None:
    """64 MiB in chunks of 1 MiB are written with a few MiB."""
    chunk = os.urandom(1 << 20)
    store = BlobStore(tmp_path / "blobs")
    ref = store.put(chunk)
    atom = IndexedTensor("w", "F32", (64, 1 << 18), (ref,) * 64)
    made = make.checkpoint(store, atoms=(atom,))
    tracemalloc.start()
    write_folder(tmp_path / "alone", made, store.read, {})
    audit_folder(tmp_path / "alone")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_a_folder_in_use_is_left_alone(store: BlobStore, folder: Path) -> None:
    before = sorted(folder.iterdir())
    with pytest.raises(BusyError, match="not empty"):
        write_folder(folder, make.checkpoint(store), store.read, {})
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("cut_after", [0, 1, 5, 12])
def test_an_export_that_is_cut_leaves_nothing(
    store: BlobStore, tmp_path: Path, cut_after: int
) -> None:
    target, left = tmp_path / "out" / "alone", cut_after

    def read(ref: BlobRef) -> bytes:
        nonlocal left
        left -= 1
        if left < 0:
            raise ChunkError("gone")
        return store.read(ref)

    with pytest.raises(ChunkError):
        write_folder(target, make.checkpoint(store), read, {})
    assert list((tmp_path / "out").iterdir()) == []


def test_an_export_that_is_killed_leaves_nothing_under_the_name(
    store: BlobStore, tmp_path: Path
) -> None:
    """A real process dies by SIGKILL between two chunks."""
    target = tmp_path / "out" / "alone"
    made = make.checkpoint(store)
    child = os.fork()
    if child == 0:
        num_read = 0

        def read(ref: BlobRef) -> bytes:
            nonlocal num_read
            num_read += 1
            if num_read == 5:
                os.kill(os.getpid(), 9)
            return store.read(ref)

        write_folder(target, made, read, {})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == 9
    assert not target.exists()
    write_folder(target, made, store.read, {})
    assert audit_folder(target).problems == ()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    with tmpfs(place, "256k"):
        yield place


def test_a_full_disk_leaves_nothing_and_the_former_manifest_whole(
    store: BlobStore, small_disk: Path
) -> None:
    big = make.checkpoint(store, atoms=make.state(store, {"w": (512, 64)}))
    with pytest.raises(SwarmError, match="No space left on device"):
        write_folder(small_disk / "alone", big, store.read, {})
    assert list(small_disk.iterdir()) == []
    shelf = Shelf(small_disk / "checkpoints")
    shelf.add(make.checkpoint(store, 10))
    with pytest.raises(OSError, match="No space left on device"):
        shelf.add(Checkpoint(big.manifest, big.signature))
    assert (shelf.steps(), shelf.load(10).is_authentic) == ((10,), True)
    assert [path.name for path in shelf.folder.iterdir()] == ["10.json"]
