"""Small files and folders that outlast a crash."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from swarmnode.home import make_folder, remove_partials, write_durably


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was synced, in turn."""
    seen: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        seen.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    return seen


def test_two_threads_may_write_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one begins and ends while the first one's bytes are on their way to the disk."""
    path, fsync = tmp_path / "file", os.fsync
    second = threading.Thread(target=write_durably, args=(path, b"second"))

    def slow(descriptor: int) -> None:
        if threading.current_thread() is not second and not second.ident:
            second.start()
            second.join()
            assert path.read_bytes() == b"second"
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    write_durably(path, b"first")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_durably(path, b"before")

    def full(_descriptor: int) -> None:
        raise OSError("no room")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no room"):
        write_durably(path, b"after")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_crash_leaves_half_written_is_found(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys\n"
        "from swarmnode.home import write_durably\n"
        "os.fsync = lambda descriptor: os._exit(7)\n"
        "write_durably(pathlib.Path(sys.argv[1]), b'half')\n"
    )
    for name in ("file", "other"):
        path = tmp_path / name
        write_durably(path, b"whole")
        done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
        assert done.returncode == 7
    assert len(list(tmp_path.iterdir())) == 4
    remove_partials(tmp_path, "file")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left[:2] == ["file", "other"]
    assert len(left) == 3
    remove_partials(tmp_path)
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"whole"}


def test_the_name_of_a_new_folder_is_on_the_disk(tmp_path: Path, synced: list[str]) -> None:
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert synced == [str(tmp_path), str(tmp_path / "a")]
    make_folder(tmp_path / "a" / "b")
    assert len(synced) == 2, "it was there"
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="exists"):
        make_folder(tmp_path / "file")
