"""The helper that the other process tests stand on."""

import subprocess
import sys
from pathlib import Path

import pytest

from swarmnode.cli.local_swarm import LocalSwarm
from swarmnode.errors import ChildError, NotFoundError

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]


def test_nodes_are_started_killed_started_again_and_stopped(tmp_path: Path) -> None:
    with LocalSwarm(tmp_path, 2, extra_args=("--lease", "3")) as swarm:
        swarm.start()
        first, second = swarm.nodes
        seen = {peer.peer for peer in first.client.peers()}
        peer = second.client.node().peer
        assert seen == {first.client.node().peer, peer}
        assert swarm.index_of(peer) == 1
        own = {process.pid for process in second.processes()}
        assert set(second.client.node().pids.values()) < own

        swarm.kill(1)
        assert second.processes() == []
        assert not own & set(swarm.pids())
        swarm.check()
        with pytest.raises(NotFoundError):
            swarm.index_of(peer)
        swarm.wait_for_peers(1, timeout_s=20)

        swarm.start_node(1, "--join", first.client.node().join_address)
        assert second.client.node().peer == peer
        swarm.wait_for_peers(2, timeout_s=20)
    assert swarm.pids() == []


def test_a_node_that_ends_by_itself_says_why(tmp_path: Path) -> None:
    with LocalSwarm(tmp_path, 1, extra_args=("--memory", "nonsense")) as swarm:
        with pytest.raises(ChildError, match=r"status 2: .*'nonsense' is no amount"):
            swarm.start()
        assert swarm.node(0).has_failed
    assert swarm.pids() == []


def test_a_home_in_use_is_refused_and_its_owner_goes_on(tmp_path: Path) -> None:
    with LocalSwarm(tmp_path, 1) as swarm:
        swarm.start()
        command = ["--home", str(swarm.node(0).home), "--host", "127.0.0.1"]
        done = subprocess.run(
            [sys.executable, "-m", "swarmnode.cli.main", "up", *command],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert "in use by another daemon" in done.stderr
        assert swarm.node(0).client.node().num_peers == 1
