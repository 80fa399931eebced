"""`swarmnode checkpoint`: of a job through a node, of a folder without one."""

import json
import sys
from pathlib import Path

import pytest
from cli_runner import Cli
from fake_node import FakeNode

from swarmnode.cli import checkpoint_verbs
from swarmnode.p2p.blob_store import BlobStore, blob_path
from swarmnode.p2p.checkpoint_files import Shelf, audit_folder, write_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "p2p"))
import checkpoint_makers as make


@pytest.fixture
def job_folder(tmp_path: Path) -> Path:
    """HOME/jobs/JOB as a node that is gone has left it."""
    folder = tmp_path / "dead" / "jobs" / "00112233aabbccdd"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    store, shelf = BlobStore(tmp_path / "dead" / "blobs"), Shelf(folder / "checkpoints")
    first = make.checkpoint(store, 10)
    shelf.add(first)
    shelf.add(make.checkpoint(store, 20, parent=first.sha256))
    return folder


def test_a_job_is_listed_verified_and_exported_by_its_node(
    cli: Cli,
    node: FakeNode,
    tmp_path: Path,
) -> None:
    (listed,) = json.loads(cli("checkpoint", "list", "tiny", "--json")[1])
    assert (listed["step"], listed["weights_sha256"]) == (3, "a" * 64)
    assert "a" * 64 in cli("checkpoint", "list", "tiny")[1]
    assert cli("checkpoint", "verify", "tiny")[:2] == (
        0,
        f"step 3: whole; weights sha256 {'a' * 64}\n",
    )
    node.problems = ("w: chunk 1 of 2 is damaged", "v: chunk 2 of 2 is damaged")
    status, out, _ = cli("checkpoint", "verify", "tiny")
    assert (status, out.splitlines()) == (1, [f"step 3: {line}" for line in node.problems])
    status, out, _ = cli("checkpoint", "verify", "tiny", "--json")
    assert (status, json.loads(out)[0]["problems"]) == (1, list(node.problems))
    out_folder = tmp_path / "out"
    answer = json.loads(cli("checkpoint", "export", "tiny", str(out_folder), "--json")[1])
    assert answer == {"step": 3, "directory": str(out_folder)}
    status, _, err = cli("checkpoint", "export", "tiny", str(out_folder))
    assert (status, err) == (2, f"swarmnode: {out_folder} is not empty\n")
    status, _, err = cli("checkpoint", "export", "tiny", str(tmp_path / "x"), "--step", "4")
    assert (status, err) == (2, "swarmnode: no checkpoint after step 4\n")


def test_a_folder_needs_no_node(job_folder: Path, tmp_path: Path, cli: Cli) -> None:
    listed = json.loads(cli("checkpoint", "list", str(job_folder), "--json")[1])
    assert [view["step"] for view in listed] == [10, 20]
    assert listed[1]["parent"] == listed[0]["sha256"]
    assert cli("checkpoint", "verify", str(job_folder))[0] == 0
    out = tmp_path / "out"
    status, text, _ = cli("checkpoint", "export", str(job_folder), str(out), "--step", "10")
    assert (status, text) == (0, f"the checkpoint after 10 steps is in {out}\n")
    assert audit_folder(out).problems == ()
    assert (out / "tokenizer.json").read_text() == "{}"
    (alone,) = json.loads(cli("checkpoint", "list", str(out), "--json")[1])
    assert alone == listed[0]
    status, text, _ = cli("checkpoint", "verify", str(out))
    assert (status, text) == (0, f"step 10: whole; weights sha256 {alone['weights_sha256']}\n")


def test_damage_is_one_line_each_and_a_failure(
    job_folder: Path,
    tmp_path: Path,
    cli: Cli,
) -> None:
    atom = Shelf(job_folder / "checkpoints").load(20).manifest.atoms[0]
    path = blob_path(tmp_path / "dead" / "blobs", atom.chunks[0])
    path.write_bytes(b"!" + path.read_bytes()[1:])
    status, out, _ = cli("checkpoint", "verify", str(job_folder))
    assert (status, len(out.splitlines())) == (1, 2)
    assert out.startswith(f"step 10: {atom.name}: chunk 1 of ")
    target = tmp_path / "out"
    status, _, err = cli("checkpoint", "export", str(job_folder), str(target))
    assert (status, target.exists()) == (1, False)
    assert "is damaged" in err


def test_what_is_no_checkpoint_is_said_in_one_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (str(tmp_path / "empty"), str(tmp_path / "none")):
        status, out, err = cli("checkpoint", "verify", place)
        assert (status, out, err.count("\n")) == (2, "", 1)


def test_a_bar_appears_only_when_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = checkpoint_verbs._Bar("checking")
    bar.show(1, 10)
    bar.close()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(checkpoint_verbs, "BAR_AFTER_S", 0.0)
    bar = checkpoint_verbs._Bar("checking")
    bar.show(1 << 20, 2 << 20)
    bar.close()
    assert capsys.readouterr() == ("", ""), "a file gets no bar"
    monkeypatch.setenv("FORCE_COLOR", "1")
    bar = checkpoint_verbs._Bar("checking")
    bar.show(1 << 20, 2 << 20)
    bar.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert "checking" in err


def test_an_exported_folder_is_not_exported_again(cli: Cli, tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs")
    write_folder(tmp_path / "alone", make.checkpoint(store), store.read, {})
    status, _, err = cli("checkpoint", "export", str(tmp_path / "alone"), str(tmp_path / "out"))
    assert (status, "copy it" in err) == (2, True)
