"""What the switch says of a link whose bandwidth is known, because the kernel enforces it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.namespaces, pytest.mark.timeout(60)]
HOSTS = ("swarmlink0", "swarmlink1")
SCRIPT = Path(__file__).with_name("link_peer.py")


def run(command: str, *, check: bool = True) -> int:
    return subprocess.run(command.split(), check=check, capture_output=True).returncode


def why_not() -> str:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        return "needs root and iproute2"
    remove()
    if run(f"ip netns add {HOSTS[0]}", check=False) != 0:
        return "network namespaces are not permitted here"
    shape = (
        f"ip netns exec {HOSTS[0]} tc qdisc add dev lo root tbf rate 1mbit burst 64kb latency 1s"
    )
    return "" if run(shape, check=False) == 0 else "the kernel has no token bucket"


def remove() -> None:
    for host in HOSTS:
        run(f"ip netns del {host}", check=False)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two namespaces joined by a veth pair: 10.78.0.1 and 10.78.0.2."""
    reason = why_not()
    remove()
    if reason:
        pytest.skip(reason)
    try:
        for host in HOSTS:
            run(f"ip netns add {host}")
        run(f"ip link add swl0 netns {HOSTS[0]} type veth peer name swl1 netns {HOSTS[1]}")
        for number, host in enumerate(HOSTS):
            run(f"ip -n {host} addr add 10.78.0.{number + 1}/24 dev swl{number}")
            run(f"ip -n {host} link set swl{number} up")
        yield HOSTS
    finally:
        remove()


def start(host: str, role: str, address: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        ["ip", "netns", "exec", host, sys.executable, str(SCRIPT), role, address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def read(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def tell(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line)
    process.stdin.flush()


@pytest.mark.parametrize("megabits", [20, 50])
def test_the_bandwidth_of_a_shaped_link_is_found_by_its_transfers(
    hosts: tuple[str, str], megabits: int
) -> None:
    bytes_per_s = answer(hosts, megabits, "send", "receive")
    assert bytes_per_s == pytest.approx(megabits * 1e6 / 8, rel=0.25)


def test_a_hidden_state_overtakes_gradients_that_were_sent_before_it(
    hosts: tuple[str, str],
) -> None:
    kinds = answer(hosts, 20, "mix", "order")
    assert sorted(kinds) == ["activation", *["gradient"] * 4]
    assert kinds.index("activation") <= 1, "only what the line took at once is before it"


def answer(hosts: tuple[str, str], megabits: int, send: str, receive: str) -> Any:
    """What the receiver says once a sender behind a line of this rate has sent."""
    run(
        f"ip netns exec {hosts[0]} tc qdisc add dev swl0 root "
        f"tbf rate {megabits}mbit burst 64kb latency 100ms"
    )
    sender, receiver = start(hosts[0], send, "10.78.0.1"), start(hosts[1], receive, "10.78.0.2")
    try:
        here, there = read(sender), read(receiver)
        for process, other in ((receiver, here), (sender, there)):
            tell(process, other)
            assert read(process) == '"joined"\n'
        for process in (receiver, sender):
            tell(process, "go\n")
        return json.loads(read(receiver))
    finally:
        for process in (sender, receiver):
            process.kill()
            process.communicate()
