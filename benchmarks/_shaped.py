"""Hosts on one machine with lines of a given rate, and processes with a given share of a core.

A host is a network namespace; a virtual cable leads to a bridge in a namespace of its own. A token
bucket at each end of the cable shapes one direction. The kernel adds no latency but that of the
queues. A share of a core is a quota of the CPU control group: the process gets no more, however
idle the machine is, so that work which waits elsewhere does not make it faster.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

_CPU_GROUPS = Path("/sys/fs/cgroup/cpu")
_PERIOD_US = 10_000
_QUEUE_MS = 200
_BURST_BYTES = 16_000
_WIRE_SHARE = 1514 / 1448
"""Of a full packet: bytes that the token bucket counts over bytes that TCP carries."""
CONGESTION_CONTROL = "reno"
"""What cubic, the default of most systems, does on lines this slow and short; a namespace may
always choose it, whatever the machine is set to."""


def why_not() -> str:
    """Why hosts cannot be made here; empty if they can."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        return "needs root and iproute2"
    return why_no_shares()


def why_no_shares() -> str:
    """Why nothing can be held to a share of a core here; empty if it can."""
    if os.geteuid() != 0:
        return "needs root"
    if not (_CPU_GROUPS / "cgroup.procs").exists():
        return f"needs the CPU controller of control groups, version 1, at {_CPU_GROUPS}"
    return ""


class Hosts:
    """`number` hosts; host i has the address 10.88.0.(i + 1). Made by `hosts`."""

    def __init__(self, number: int) -> None:
        self._names = [f"ov{os.getpid()}n{index}" for index in range(number)]
        self._hub = f"ov{os.getpid()}hub"

    def address(self, host: int) -> str:
        return f"10.88.0.{host + 1}"

    def inside(self, host: int, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` on a host."""
        return ["ip", "netns", "exec", self._names[host], *argv]

    def shape(self, bytes_per_s: float | None) -> None:
        """Let TCP carry so much on every line, up and down each; None takes all shaping away."""
        for index, name in enumerate(self._names):
            for namespace, device in ((name, "line"), (self._hub, f"to{index}")):
                if bytes_per_s is None:
                    _run("tc", "-n", namespace, "qdisc", "del", "dev", device, "root", check=False)
                    continue
                _run(
                    "tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf",
                    "rate", f"{bytes_per_s * _WIRE_SHARE * 8:.0f}bit", "burst", f"{_BURST_BYTES}",
                    "latency", f"{_QUEUE_MS}ms",
                )  # fmt: skip

    def _make(self) -> None:
        _run("ip", "netns", "add", self._hub)
        _run("ip", "-n", self._hub, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", self._hub, "link", "set", "bridge", "up")
        for index, name in enumerate(self._names):
            port = f"to{index}"
            _run("ip", "netns", "add", name)
            _run(
                "ip", "-n", self._hub, "link", "add", port, "type", "veth",
                "peer", "name", "line", "netns", name,
            )  # fmt: skip
            _run("ip", "-n", self._hub, "link", "set", port, "master", "bridge", "up")
            _run("ip", "-n", name, "addr", "add", f"{self.address(index)}/24", "dev", "line")
            _run("ip", "-n", name, "link", "set", "lo", "up")
            control = f"net.ipv4.tcp_congestion_control={CONGESTION_CONTROL}"
            _run("ip", "netns", "exec", name, "sysctl", "-qw", control)
            _run("ip", "-n", name, "link", "set", "line", "up")

    def _remove(self) -> None:
        for name in (*self._names, self._hub):
            _run("ip", "netns", "del", name, check=False)


@contextlib.contextmanager
def hosts(number: int) -> Iterator[Hosts]:
    """Hosts for as long as the context lasts."""
    made = Hosts(number)
    try:
        made._make()
        yield made
    finally:
        made._remove()


class CoreShare:
    """A control group whose processes together get `share` of one core. Made by `core_share`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def hold(self, pid: int) -> None:
        """Put a process in, with what it will fork."""
        with contextlib.suppress(ProcessLookupError):
            (self._path / "cgroup.procs").write_text(f"{pid}\n")

    def throttled_s(self) -> float:
        """Seconds that its processes were held back so far."""
        for line in (self._path / "cpu.stat").read_text().splitlines():
            name, value = line.split()
            if name == "throttled_time":
                return int(value) / 1e9
        return 0.0


@contextlib.contextmanager
def core_share(name: str, share: float) -> Iterator[CoreShare]:
    """A group for as long as the context lasts; its processes must have ended by then."""
    path = _CPU_GROUPS / f"swarmnode-{os.getpid()}-{name}"
    path.mkdir()
    try:
        (path / "cpu.cfs_period_us").write_text(f"{_PERIOD_US}\n")
        (path / "cpu.cfs_quota_us").write_text(f"{int(share * _PERIOD_US)}\n")
        yield CoreShare(path)
    finally:
        with contextlib.suppress(OSError):
            path.rmdir()


def _run(*argv: str, check: bool = True) -> None:
    subprocess.run(argv, check=check, stderr=None if check else subprocess.DEVNULL)
