"""The demo as its user runs it: a command, its JSON, its exit status, and nothing left behind."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from swarmnode.cli.local_swarm import LocalSwarm
from swarmnode.cli.weights_hash import weights_sha256

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]
KEYS = [
    "steps", "first_loss", "final_loss", "val_loss", "seconds", "tokens_per_s",
    "bytes_activation", "bytes_gradient", "killed_peer", "recovery_s", "kills",
    "recovery_p50_s", "recovery_max_s", "weights_sha256", "generations", "export_dir", "endpoint",
    "samples",
]  # fmt: skip


def demo(folder: Path, *args: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "swarmnode.cli.main", "demo", "--json", "--keep", str(folder)]
    return subprocess.Popen(
        [*argv, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[LocalSwarm]:
    """A view of the demo's processes; whatever is left of them in the end is killed."""
    view = LocalSwarm(tmp_path / "demo", 4)
    yield view
    for node in view.nodes:
        node.kill()


def until_running(swarm: LocalSwarm, process: subprocess.Popen[str], num_pids: int) -> None:
    deadline_s = time.monotonic() + 60
    while len(swarm.pids()) < num_pids:
        assert process.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_small_demo_trains_loses_a_worker_exports_and_answers(swarm: LocalSwarm) -> None:
    process = demo(swarm.root, "--steps", "45")
    out, err = process.communicate(timeout=230)
    assert process.returncode == 0, err
    summary = json.loads(out)
    assert list(summary) == KEYS
    assert summary["steps"] == 45
    assert summary["val_loss"] < 3.4 < summary["first_loss"]
    assert 0 < summary["recovery_s"] <= 15
    (kill,) = summary["kills"]
    assert (kill["victim"], kill["what"]) == (summary["killed_peer"], "node")
    assert kill["at_step"] >= 15
    assert summary["recovery_s"] == summary["recovery_p50_s"] == summary["recovery_max_s"]
    assert summary["generations"] >= 2
    assert summary["killed_peer"][-6:] in err
    assert min(summary["bytes_activation"], summary["bytes_gradient"]) > 1 << 20
    assert [text.split(" ")[0] for text in summary["samples"]] == ["def", "import", "class"]
    for text in summary["samples"]:
        assert len(text) > 20
        assert all(letter.isprintable() or letter == "\n" for letter in text)
    export = Path(summary["export_dir"])
    assert weights_sha256(export) == summary["weights_sha256"]
    names = {path.name for path in export.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert swarm.pids() == []


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)]
)
def test_a_demo_that_is_ended_leaves_nothing_running(
    swarm: LocalSwarm, number: signal.Signals, status: int
) -> None:
    process = demo(swarm.root, "--no-kill")
    until_running(swarm, process, 6)
    process.send_signal(number)
    _, err = process.communicate(timeout=40)
    assert process.returncode == status
    assert "Traceback" not in err
    gone_by_s = time.monotonic() + 5  # the kernel kills them; none is ours to wait for
    while pids := swarm.pids():
        assert time.monotonic() < gone_by_s, [psutil.Process(pid).cmdline() for pid in pids]
        time.sleep(0.05)


def test_a_demo_without_data_fails_in_one_line_and_leaves_nothing(
    swarm: LocalSwarm, tmp_path: Path
) -> None:
    process = demo(swarm.root, "--data", str(tmp_path / "missing.txt"))
    out, err = process.communicate(timeout=90)
    assert (process.returncode, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("swarmnode: ")
    assert "missing.txt" in last
    assert swarm.pids() == []
