"""Links that break and heal, or are slow: four nodes on four hosts of their own."""

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from swarmnode.children import leashed, python_module
from swarmnode.cli.client import NodeClient
from swarmnode.errors import SwarmError
from swarmnode.http.api import JobView
from tests.chaos.hosts import Hosts, why_not
from tests.chaos.trial import LIMIT_S, NODES, Outcome, outcome_at, tiny_job, until

Found = TypeVar("Found")
pytestmark = [
    pytest.mark.processes, pytest.mark.namespaces, pytest.mark.long, pytest.mark.timeout(300),
]  # fmt: skip


class Far:
    """A daemon on each of so many hosts; node 0 coordinates."""

    def __init__(self, hosts: Hosts, root: Path, text: Path, num_nodes: int = NODES) -> None:
        self.hosts = hosts
        self.num_nodes = num_nodes
        self.text = text
        self.homes = [root / f"node-{index}" for index in range(num_nodes)]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.peers: list[str] = []

    def start(self) -> None:
        join: tuple[str, ...] = ()
        for index in range(self.num_nodes):
            self._spawn(index, join)
            if index == 0:
                until(lambda: self.answers(0), "the first node is ready")
                address = self.ask(0, lambda client: client.node().join_address)
                join = ("--join", address)
        until(lambda: all(map(self.answers, range(self.num_nodes))), "all nodes are ready")
        until(lambda: self.ask(0, lambda c: len(c.peers())) == self.num_nodes, "all see each other")
        self.peers = [
            self.ask(at, lambda client: client.node().peer) for at in range(self.num_nodes)
        ]

    def _spawn(self, index: int, join: tuple[str, ...]) -> None:
        home = self.homes[index]
        home.mkdir(parents=True)
        inside = ["ip", "netns", "exec", self.hosts.names[index]]
        argv = [*inside, *python_module("swarmnode.cli.main", "up", "--home", str(home))]
        with (home / "output.log").open("wb") as output:
            address = self.hosts.addresses[index]
            self.processes.append(
                subprocess.Popen(
                    leashed([*argv, "--host", address, "--threads", "1", *join]),
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                )
            )  # fmt: skip

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def ask(self, index: int, question: Callable[[NodeClient], Found]) -> Found:
        """What a node answers on its own loopback. Raises: SwarmError."""

        def work() -> Found:
            with NodeClient.of_home(self.homes[index]) as client:
                return question(client)

        return self.hosts.call(index, work)

    def answers(self, index: int) -> bool:
        assert self.processes[index].poll() is None, (self.homes[index] / "output.log").read_text()
        with contextlib.suppress(SwarmError):
            return self.ask(index, lambda client: client.node()) is not None
        return False

    def until(
        self, job: str, holds: Callable[[JobView], bool], limit_s: float = LIMIT_S
    ) -> JobView:
        """The job's view at node 0 as soon as `holds`."""
        deadline_s = time.monotonic() + limit_s
        while not holds(view := self.ask(0, lambda client: client.job(job))):
            assert view.phase not in ("failed", "stopped", "handed over"), view.reason
            assert time.monotonic() < deadline_s, view
            time.sleep(0.02)
        return view

    def submit(self, name: str) -> str:
        return self.ask(0, lambda client: client.submit(tiny_job(self.text, name), self.text))

    def outcome(self, job: str) -> Outcome:
        """Wait until the job serves, and end it."""
        self.until(job, lambda view: view.phase == "serving")
        found = self.ask(0, lambda client: outcome_at(client, job))
        self.ask(0, lambda client: client.stop(job))
        return found


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Iterator[Far]:
    if reason := why_not():
        pytest.skip(reason)
    hosts = Hosts(NODES)
    try:
        hosts.make()
        swarm = Far(hosts, tmp_path_factory.mktemp("far"), text)
        try:
            swarm.start()
            yield swarm
        finally:
            swarm.stop()
    finally:
        hosts.remove()


def test_a_slow_link_costs_time_only_and_a_worker_that_was_cut_off_too(
    far: Far, undisturbed: Outcome
) -> None:
    far.hosts.slow_down(1, "5mbit")
    job = far.submit("cut-off")
    before = far.until(job, lambda view: view.step >= 4)
    cut_off = max(far.peers.index(peer) for row in before.placement for peer in row)
    assert cut_off > 1, "neither the coordinator nor the slow one"
    far.hosts.cut(cut_off)
    try:
        after = far.until(
            job, lambda view: view.generation > before.generation and view.step > before.step
        )
        assert far.peers[cut_off] not in {peer for row in after.placement for peer in row}
    finally:
        far.hosts.heal(cut_off)
    assert far.outcome(job) == undisturbed
    until(lambda: far.ask(0, lambda c: len(c.peers())) == NODES, "all see each other again")
