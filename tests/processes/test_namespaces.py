"""A volunteer on another host: two network namespaces, one address to type, and work arrives."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarmnode.children import leashed, python_module
from tests.processes.conftest import job_file

pytestmark = [pytest.mark.processes, pytest.mark.namespaces, pytest.mark.timeout(180)]
HOSTS = ("swarmtest0", "swarmtest1")


def ip(*words: str, check: bool = True) -> int:
    return subprocess.run(["ip", *words], check=check, capture_output=True).returncode


def why_not() -> str:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "needs root and iproute2"
    for host in HOSTS:
        ip("netns", "del", host, check=False)
    if ip("netns", "add", HOSTS[0], check=False) != 0:
        return "network namespaces are not permitted here"
    ip("netns", "del", HOSTS[0])
    return ""


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two namespaces joined by a veth pair: 10.79.0.1 and 10.79.0.2."""
    if reason := why_not():
        pytest.skip(reason)
    try:
        for host in HOSTS:
            ip("netns", "add", host)
            ip("-n", host, "link", "set", "lo", "up")
        ip("link", "add", "swt0", "netns", HOSTS[0], "type", "veth", "peer", "name", "swt1")
        ip("link", "set", "swt1", "netns", HOSTS[1])
        for number, host in enumerate(HOSTS):
            ip("-n", host, "addr", "add", f"10.79.0.{number + 1}/24", "dev", f"swt{number}")
            ip("-n", host, "link", "set", f"swt{number}", "up")
        yield HOSTS
    finally:
        for host in HOSTS:
            ip("netns", "del", host, check=False)


@contextlib.contextmanager
def node_in(host: str, home: Path, *args: str) -> Iterator[str]:
    """A daemon in a namespace with no more than a volunteer types; yields its first lines."""
    home.mkdir(parents=True)
    argv = ["ip", "netns", "exec", host, *python_module("swarmnode.cli.main", "up")]
    with (home / "output.log").open("wb") as output:
        process = subprocess.Popen(
            leashed([*argv, "--home", str(home), "--threads", "1", *args]),
            stdout=output,
            stderr=output,
        )
    try:
        yield str(home / "output.log")
    finally:
        process.terminate()
        process.wait(15)


def ask(host: str, home: Path, *args: str) -> str:
    """Run a verb beside the daemon, as its user would."""
    argv = ["ip", "netns", "exec", host, *python_module("swarmnode.cli.main", *args)]
    done = subprocess.run(
        [*argv, "--home", str(home)], capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout if done.returncode == 0 else ""


def test_one_address_is_all_that_another_host_needs(
    hosts: tuple[str, str], tmp_path: Path, text: Path
) -> None:
    import json

    from tests.processes.test_lifecycle import to_toml

    first, second = tmp_path / "first", tmp_path / "second"

    def until(argv: tuple[str, Path, tuple[str, ...]], holds: str) -> object:
        import time

        deadline_s = time.monotonic() + 90
        host, home, args = argv
        while time.monotonic() < deadline_s:
            answer = ask(host, home, *args)
            if answer and eval_json(holds, json.loads(answer)):
                return json.loads(answer)
        raise AssertionError(f"{args}: never {holds}; {(home / 'output.log').read_text()}")

    with node_in(hosts[0], first):
        status = until((hosts[0], first, ("status", "--json")), "join")
        assert isinstance(status, dict)
        address = status["join_address"]
        assert "/ip4/10.79.0.1/" in address, "an address that another host can use"
        with node_in(hosts[1], second, "--join", address):
            until((hosts[0], first, ("peers", "--json")), "two")
            job = job_file(text, "far", placement={"slots": 1}, run={"steps": 10})
            path = tmp_path / "job.toml"
            path.write_text(to_toml(job))
            assert ask(hosts[0], first, "submit", str(path))
            until((hosts[0], first, ("jobs", "--json")), "serving")
            hosted = until((hosts[1], second, ("status", "--json")), "hosted")
            assert isinstance(hosted, dict)
            assert len(hosted["hosted"]) == 1, "the volunteer was given work"


def eval_json(what: str, answer: object) -> bool:
    """The observations that the test waits for."""
    if what == "join":
        return isinstance(answer, dict) and bool(answer.get("join_address"))
    if what == "two":
        return isinstance(answer, list) and len(answer) == 2
    if what == "serving":
        return isinstance(answer, list) and answer[0]["phase"] == "serving"
    return isinstance(answer, dict) and bool(answer.get("hosted"))
