"""Several hosts on one machine: network namespaces on a bridge, and calls made from inside them."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")
PREFIX = f"sw{os.getpid()}x"
"""Of this run: another one beside it has namespaces of its own."""
_NEW_NET = 0x40000000


def ip(*words: str, check: bool = True) -> int:
    return subprocess.run(["ip", *words], check=check, capture_output=True).returncode


def why_not() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        return "needs root and iproute2"
    if ip("netns", "add", f"{PREFIX}x", check=False) != 0:
        return "network namespaces are not permitted here"
    ip("netns", "del", f"{PREFIX}x")
    return ""


class Hosts:
    """Namespaces 0..n-1 with addresses 10.81.0.1 and so on; `remove` in the end, always."""

    def __init__(self, num_hosts: int) -> None:
        self.names = [f"{PREFIX}{index}" for index in range(num_hosts)]
        self.addresses = [f"10.81.0.{index + 1}" for index in range(num_hosts)]
        self._hub = f"{PREFIX}hub"
        self._threads = [
            ThreadPoolExecutor(1, initializer=_enter, initargs=(n,)) for n in self.names
        ]

    def make(self) -> None:
        """Namespaces and links. Raises: subprocess.CalledProcessError."""
        for name in (*self.names, self._hub):
            ip("netns", "del", name, check=False)
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", self._hub, "link", "add", "hub", "type", "bridge")
        ip("-n", self._hub, "link", "set", "hub", "up")
        for index, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            port = f"port{index}"
            ip("link", "add", "eth0", "netns", name, "type", "veth",
               "peer", "name", port, "netns", self._hub)  # fmt: skip
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", self._hub, "link", "set", port, "master", "hub", "up")

    def remove(self) -> None:
        for thread in self._threads:
            thread.shutdown()
        for name in (*self.names, self._hub):
            ip("netns", "del", name, check=False)

    def cut(self, index: int) -> None:
        """Nothing reaches the host any more, and nothing that it sends arrives."""
        ip("-n", self._hub, "link", "set", f"port{index}", "down")

    def heal(self, index: int) -> None:
        ip("-n", self._hub, "link", "set", f"port{index}", "up")

    def slow_down(self, index: int, rate: str) -> None:
        """What the host sends leaves at `rate`, such as 5mbit."""
        subprocess.run(
            ["tc", "-n", self.names[index], "qdisc", "add", "dev", "eth0", "root",
             "tbf", "rate", rate, "burst", "16kb", "latency", "400ms"],
            check=True, capture_output=True,
        )  # fmt: skip

    def call(self, index: int, work: Callable[[], Found]) -> Found:
        """Do `work` in a thread that lives on that host."""
        return self._threads[index].submit(work).result()


def _enter(name: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", name).open("rb") as file:
        if libc.setns(file.fileno(), _NEW_NET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {name}")
