"""How a node starts, stops and dies; what it refuses."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from swarmnode.cli.local_swarm import LocalSwarm
from swarmnode.domain import Generation, JobId, SlotId
from swarmnode.errors import PeerLostError
from swarmnode.messages import (
    Frame,
)
from swarmnode.p2p.ports import EndOfStream
from swarmnode.p2p.streams import Libp2pTransport
from swarmnode.wire import MAX_TENSOR_BYTES, TENSOR_PROTOCOL, pack
from tests.processes.conftest import job_file, wait_for
from tests.tmpfs import fill, tmpfs

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]
STOP_S = 5.0


def command(*args: str, home: Path) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, "-m", "swarmnode.cli.main", *args, "--home", str(home)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


def assert_one_clear_line(done: "subprocess.CompletedProcess[str]", *words: str) -> None:
    """Exit status 2 and one line on stderr that has every word."""
    assert done.returncode == 2, done
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert all(word in lines[0] for word in words), lines[0]


def test_a_node_stops_in_time_and_leaves_nothing(tmp_path: Path) -> None:
    with LocalSwarm(tmp_path, 1) as swarm:
        swarm.start()
        node = swarm.node(0)
        home = node.home
        assert (home / "identity.key").stat().st_mode & 0o777 == 0o600
        assert (home / "token").stat().st_mode & 0o777 == 0o600
        started_s = time.monotonic()
        node.ask_to_stop()
        assert node.wait_stopped(STOP_S) == 0, node.log_tail()
        assert time.monotonic() - started_s < STOP_S
        assert not swarm.pids()


def test_what_a_node_cannot_write_in_its_home_is_one_clear_line_at_most(tmp_path: Path) -> None:
    with LocalSwarm(tmp_path, 1) as swarm:
        node = swarm.node(0)
        home = node.home
        home.mkdir(exist_ok=True)
        with tmpfs(home, "8m", is_lazy=True):
            home.chmod(0o700)
            (home / "network.partial").mkdir()  # nothing can be written under that name
            swarm.start()
            assert not (home / "network.json").exists(), "it goes without"
            node.ask_to_stop()
            assert node.wait_stopped(STOP_S) == 0, node.log_tail()
            (home / "http.partial").mkdir()
            done = command("up", home=home)
            words = f"swarmnode: failed: {home / 'http.partial'} cannot be used: Is a directory"
            assert (done.returncode, done.stderr.splitlines()) == (1, [words])
            (home / "http.partial").rmdir()
            ballast = fill(home)
            done = command("up", home=home)
            assert_one_clear_line(done, str(home / "p2pd.key"), "No space left on device")
            ballast.unlink()
            swarm.start()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_child_outlives_a_daemon_that_works(
    tmp_path: Path, text: Path, number: signal.Signals
) -> None:
    with LocalSwarm(tmp_path, 1) as swarm:
        swarm.start()
        node = swarm.node(0)
        job = job_file(text, "alone", placement={"min_peers": 1}, run={"steps": 10_000})
        name = node.client.submit(job, text)
        wait_for(node.client, name, lambda view: view.step >= 1)
        roles = node.client.node().pids
        assert set(roles) == {"daemon", "directory", f"worker:{name}"}
        family = node.processes()
        assert len(family) >= 4, "daemon, directory, its Go daemon, worker"
        node.was_killed = True  # so that the swarm does not complain
        os.kill(roles["daemon"], number)
        _gone, alive = psutil.wait_procs(family, timeout=STOP_S + 1)
        assert not alive, alive


def test_finish_says_what_ended_with_a_node_that_is_alone(tmp_path: Path, text: Path) -> None:
    """It coordinates its job, and there is nobody who could have its slots."""
    with LocalSwarm(tmp_path, 1) as swarm:
        swarm.start()
        node = swarm.node(0)
        job = job_file(text, "last", placement={"min_peers": 1}, run={"steps": 10_000})
        name = node.client.submit(job, text)
        wait_for(node.client, name, lambda view: view.step >= 1)
        done = command("finish", "--json", home=node.home)
        assert node.wait_stopped(STOP_S) == 0, node.log_tail()
        assert done.returncode == 1, done
        said = json.loads(done.stdout)
        assert (said["handed_over"], len(said["kept"])) == ([], 4)
        assert (said["coordinated"], said["in_time"]) == ([name], True)


def test_a_daemon_that_was_killed_takes_its_job_up_again(tmp_path: Path, text: Path) -> None:
    with LocalSwarm(tmp_path, 1) as swarm:
        swarm.start()
        job = job_file(
            text, "again", placement={"min_peers": 1}, run={"steps": 60, "checkpoint_every": 10}
        )
        name = swarm.node(0).client.submit(job, text)
        wait_for(swarm.node(0).client, name, lambda view: (view.checkpoint_step or 0) >= 10)
        swarm.kill(0)
        swarm.start_node(0)
        view = wait_for(swarm.node(0).client, name, lambda view: view.phase == "serving")
        assert view.step == 60
        assert len(swarm.node(0).client.losses(name)) == 60


def test_a_home_belongs_to_one_daemon(swarm: LocalSwarm) -> None:
    done = command("up", home=swarm.node(0).home)
    assert_one_clear_line(done, "in use by another daemon", "--home")
    assert swarm.node(0).client.node().uptime_s > 0, "the first one did not notice"


def test_a_port_in_use_is_one_clear_line(swarm: LocalSwarm, tmp_path: Path) -> None:
    port = swarm.node(0).client.node().http_address.rpartition(":")[2]
    done = command("up", "--host", "127.0.0.1", "--http-port", port, home=tmp_path)
    assert_one_clear_line(done, port, "in use")
    port = swarm.node(0).client.node().transport_addresses[0].split("/")[4]
    done = command("up", "--host", "127.0.0.1", "--transport-port", port, home=tmp_path)
    assert_one_clear_line(done, port, "in use")


def test_nobody_at_the_address_to_join_is_one_clear_line(tmp_path: Path, swarm: LocalSwarm) -> None:
    peer = swarm.node(0).client.node().peer
    done = command(
        "up", "--host", "127.0.0.1", "--join", f"/ip4/127.0.0.1/tcp/9/p2p/{peer}", home=tmp_path
    )
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert "join" in lines[0]


def test_a_stale_token_is_refused_and_a_missing_daemon_is_named(
    swarm: LocalSwarm, tmp_path: Path
) -> None:
    assert_one_clear_line(command("status", home=tmp_path), "swarmnode up")
    http = json.loads((swarm.node(0).home / "http.json").read_text())
    (tmp_path / "http.json").write_text(json.dumps(http))
    (tmp_path / "token").write_text("x" * 43)
    assert_one_clear_line(command("jobs", home=tmp_path), "token")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"run": {"stepz": 3}}, ["run.stepz", "unknown key"]),
        ({"run": {"steps": -1}}, ["run.steps", "-1"]),
        ({"codecs": {"activation": "int3"}}, ["codecs.activation", "int3"]),
        ({"data": {"path": "nowhere"}}, ["nowhere"]),
        ({"data": {"path": "empty"}}, ["empty"]),
        ({"model": {"config": {"model_type": "llama", "vocab_size": 100}}}, ["vocabulary"]),
        ({"placement": {"stages": 5}}, ["layers", "stages"]),
        ({"placement": {"min_peers": 9}}, ["4 of 9 peers"]),
        ({"batch": {"num_microbatches": 3}}, ["num_microbatches", "multiple"]),
        ({"batch": {"sequence_length": 4096}}, ["sequence_length", "positions"]),
        ({"tokenizer": "nowhere"}, ["nowhere"]),
    ],
)
def test_a_bad_job_is_refused_with_one_clear_line_and_nothing_is_lost(
    swarm: LocalSwarm, text: Path, tmp_path: Path, change: dict[str, object], words: list[str]
) -> None:
    import tomllib

    (tmp_path / "empty").mkdir()
    job = job_file(text, "bad", **change)
    if "model" in change:
        job["model"] = change["model"]
    path = tmp_path / "job.toml"
    path.write_text(to_toml(job))
    assert tomllib.loads(path.read_text())["name"] == "bad"
    before = {view.job for view in swarm.node(0).client.jobs()}
    done = command("submit", str(path), home=swarm.node(0).home)
    assert_one_clear_line(done, *words)
    assert {view.job for view in swarm.node(0).client.jobs()} == before


def to_toml(job: dict[str, object]) -> str:
    """Just enough TOML for a job: nested tables of scalars."""
    lines: list[str] = []

    def write(table: dict[str, object], prefix: str) -> None:
        for key, value in table.items():
            if not isinstance(value, dict):
                lines.append(f"{key} = {json.dumps(value)}")
        for key, value in table.items():
            if isinstance(value, dict):
                lines.append(f"[{prefix}{key}]")
                write(value, f"{prefix}{key}.")

    write(job, "")
    return "\n".join(lines) + "\n"


async def test_a_peer_that_the_plan_does_not_name_is_refused_and_counted(
    swarm: LocalSwarm, text: Path
) -> None:
    node = swarm.node(0)
    job = node.client.submit(job_file(text, "guarded", run={"steps": 10_000}), text)
    try:
        view = wait_for(node.client, job, lambda view: view.step >= 1)
        before = node.client.node().dropped.get("refused_peer", 0)
        me = node.client.node()
        frame = Frame(
            job=JobId(job),
            generation=Generation(view.generation),
            step=view.step,
            kind="activation",
            source=SlotId(0, 0),
            target=SlotId(1, 0),
            microbatch=0,
            group=0,
            part=0,
            shape=(1,),
        )
        async with Libp2pTransport.start(os.urandom(32), ["/ip4/127.0.0.1/tcp/0"]) as stranger:

            async def knock() -> None:
                """The refusal arrives at once, or after something was sent."""
                async with asyncio.timeout(20):
                    stream = await stranger.open(
                        me.peer,
                        me.transport_addresses,
                        TENSOR_PROTOCOL,
                        max_message_bytes=MAX_TENSOR_BYTES,
                    )
                    await stream.send(pack(frame), b"\0\0\0\0")
                    await stream.receive()

            with pytest.raises((PeerLostError, EndOfStream)):
                await knock()
        assert node.client.node().dropped["refused_peer"] == before + 1
        after = node.client.job(job)
        assert after.recoveries == 0
        wait_for(node.client, job, lambda view: view.step > after.step)
    finally:
        node.client.stop(job)


@pytest.mark.parametrize("victim", ["directory", "p2pd"])
def test_a_directory_that_dies_is_started_again_where_it_was(tmp_path: Path, victim: str) -> None:
    with LocalSwarm(tmp_path, 2) as swarm:
        swarm.start()
        node = swarm.node(0)
        before = node.client.node()
        names = {process.pid: process.name() for process in node.processes()}
        if victim == "directory":
            pid = before.pids["directory"]
        else:
            pid = next(pid for pid, name in names.items() if name.startswith("p2pd"))
        os.kill(pid, signal.SIGKILL)
        deadline_s = time.monotonic() + 60
        while True:
            after = node.client.node()
            swarm.check()
            if after.pids["directory"] != before.pids["directory"] and after.num_peers == 2:
                break
            assert time.monotonic() < deadline_s, after
            time.sleep(0.1)
        assert after.join_address == before.join_address


def test_a_node_comes_back_to_its_swarm_without_being_told_how(tmp_path: Path) -> None:
    with LocalSwarm(tmp_path, 2) as swarm:
        swarm.start()
        address = swarm.node(0).client.node().join_address
        for index in (1, 0):
            swarm.kill(index)
            swarm.start_node(index)
            swarm.wait_for_peers(2, seen_by=0)
            swarm.wait_for_peers(2, seen_by=1)
        assert swarm.node(0).client.node().join_address == address
