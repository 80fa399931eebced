"""Places where a test may kill a process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from swarmnode import failpoints


@pytest.mark.parametrize(
    ("armed", "step", "found"),
    [("after_log", 3, True), ("after_log:3", 3, True), ("after_log:3", 4, False), ("", 3, False),
     ("before_log", 3, False)],
)  # fmt: skip
def test_a_failpoint_is_armed_by_name_and_step(
    armed: str, step: int, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failpoints, "_ARMED", armed)
    assert failpoints.is_armed("after_log", step) is found


@pytest.mark.parametrize("are_links", [True, False])
def test_of_several_who_share_a_file_one_dies(are_links: bool, tmp_path: Path) -> None:
    """Each with a file of its own dies."""
    shared = tmp_path / "shared"
    shared.write_text("here:3")
    lives = []
    for index in range(4):
        armed = tmp_path / str(index)
        armed.symlink_to(shared) if are_links else armed.write_text("here:3")
        code = "from swarmnode.failpoints import hit; input(); hit('here', 2); hit('here', 3)"
        env = {**os.environ, "SWARMNODE_FAILPOINT": f"@{armed}"}
        lives.append(subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, env=env))
    for life in lives:
        assert life.stdin is not None
        life.stdin.write(b"\n")
        life.stdin.flush()
    ends = sorted(life.wait(60) for life in lives)
    for life in lives:
        assert life.stdin is not None
        life.stdin.close()
    dead = 1 if are_links else 4
    assert ends == [-signal.SIGKILL] * dead + [0] * (4 - dead)
    assert shared.exists() is not are_links
