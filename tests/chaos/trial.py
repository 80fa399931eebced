"""A swarm of real daemons that faults are done to, and one small job at a time on it.

The oracle is the undisturbed run: its loss of every step and the SHA-256 of its final weights.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from swarmnode.cli.client import NodeClient
from swarmnode.cli.local_swarm import LocalNode, LocalSwarm
from swarmnode.config import LOG_FILE
from swarmnode.coordinator.events import CommitRecord, Record, StartedRecord
from swarmnode.coordinator.journal import read_journal
from swarmnode.errors import SwarmError
from swarmnode.http.api import JobView
from tests.processes.conftest import TINY_LLAMA, job_file

NODES, STEPS, EVERY, SEED = 4, 24, 8, 7
TINY = {**TINY_LLAMA, "hidden_size": 32, "intermediate_size": 64}
GRID = {"stages": 2, "slots": 2, "layers": [2, 2]}
LIMIT_S = 90.0
_LOOK_S = 0.02


def failpoint(node: LocalNode) -> Path:
    """The file that arms a node."""
    return node.home.with_name(f"{node.home.name}.failpoint")


@dataclass(frozen=True)
class Outcome:
    """What a run has to have in common with the undisturbed one."""

    losses: tuple[float | None, ...]
    weights: str


def until(holds: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    """Look until `holds`; fails with `what` if it never does."""
    deadline_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline_s, f"not within {limit_s:.0f} s: {what}"
        time.sleep(_LOOK_S)


def outcome_at(client: NodeClient, job: str) -> Outcome:
    """What a job that serves has made; the weights are those that an export would have."""
    newest = client.checkpoints(job)[-1]
    assert newest.step == STEPS
    return Outcome(tuple(client.losses(job)), newest.weights_sha256)


class Trial:
    """Four daemons on this machine's loopback; node 0 coordinates what is submitted."""

    def __init__(self, swarm: LocalSwarm, text: Path) -> None:
        self.swarm = swarm
        self.text = text
        for node in swarm.nodes:
            node.variables = {"SWARMNODE_FAILPOINT": f"@{failpoint(node)}"}
        swarm.start()
        self.peers = [node.client.node().peer for node in swarm.nodes]
        self.asleep: set[int] = set()
        """Nodes that answer nothing, and are not asked."""

    def node(self, index: int) -> LocalNode:
        return self.swarm.node(index)

    def start(self, indices: Iterable[int]) -> None:
        """Start nodes that are dead, together; returns when they answer."""
        starting = list(indices)
        self.spawn(starting)
        for index in starting:
            until(self.node(index).is_ready, f"node {index} is ready")

    def spawn(self, indices: Iterable[int]) -> None:
        """Start nodes that are dead; what is armed may kill them before they answer."""
        joins = self._joins()
        for index in indices:
            self.node(index).spawn(*joins)

    def arm(self, index: int, place: str) -> None:
        """From now on the node, or a child of it, dies once at `place`."""
        _write(failpoint(self.node(index)), place)

    def arm_first(self, place: str) -> None:
        """From now on the first daemon or child of any node that comes to `place` dies there, and
        then `was_hit` says so of every node."""
        armed = self.node(0).home.with_name("first.failpoint")
        _write(armed, place)
        for node in self.swarm.nodes:
            failpoint(node).unlink(missing_ok=True)
            failpoint(node).symlink_to(armed)

    def disarm(self) -> None:
        """Nobody is to die any more."""
        for node in self.swarm.nodes:
            armed = failpoint(node)
            armed.resolve().unlink(missing_ok=True)
            armed.unlink(missing_ok=True)

    def was_hit(self, index: int) -> bool:
        """Whether what was armed has killed somebody."""
        return not failpoint(self.node(index)).exists()

    @contextlib.contextmanager
    def daemon_asleep(self, index: int) -> Iterator[None]:
        """Stop the daemon of a node, but nothing else of it, where it is; in the end it goes on."""
        daemon = psutil.Process(self.node(index).client.node().pids["daemon"])
        daemon.suspend()
        self.asleep.add(index)
        try:
            yield
        finally:
            daemon.resume()
            self.asleep.remove(index)

    def fallen(self) -> list[int]:
        """Nodes of which the daemon is dead, with all that they started."""
        dead = [n for n in self.swarm.nodes if not any(_is_daemon(p) for p in n.processes())]
        for node in dead:
            node.kill()
        return [node.index for node in dead]

    def heal(self) -> None:
        """Whoever is dead is started again; returns when everybody sees everybody."""
        self.disarm()
        self.start(self.fallen())
        for node in self.swarm.nodes:
            self.swarm.wait_for_peers(NODES, seen_by=node.index)

    def submit(self, name: str, seed: int = SEED, *, is_watched: bool = True) -> "Job":
        """Begin the job that every case runs, placed on all four.

        `is_watched`: wait until it is; somebody who dies early may not be waited for.
        """
        job = Job(self, self.node(0).client.submit(tiny_job(self.text, name, seed), self.text))
        if is_watched:
            view = job.until(lambda view: view.phase not in ("waiting", "placing"))
            hosts = sorted(index for stage in job.hosts(view) for index in stage)
            assert hosts == list(range(NODES)), f"{name} is not placed on all four"
        return job

    def _joins(self) -> list[str]:
        args = []
        for node in self.swarm.nodes:
            if node.processes():
                with contextlib.suppress(SwarmError):
                    args += ["--join", node.client.node().join_address]
        return args


def tiny_job(text: Path, name: str, seed: int = SEED) -> dict[str, Any]:
    """The job that every case runs."""
    run = {"steps": STEPS, "seed": seed, "deterministic": True, "checkpoint_every": EVERY}
    batch = {"rows": 1, "sequence_length": 32}
    return job_file(text, name, model={"config": TINY}, batch=batch, placement=GRID, run=run)


def _write(armed: Path, place: str) -> None:
    """In one piece: whoever reads it finds all of it, or nothing."""
    draft = armed.with_suffix(".draft")
    draft.write_text(place, encoding="utf-8")
    draft.replace(armed)


def suspend(node: LocalNode) -> list[psutil.Process]:
    """Stop all processes of a node where they are; resume them, or kill them."""
    processes = node.processes()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
    return processes


def _is_daemon(process: psutil.Process) -> bool:
    try:
        return "up" in process.cmdline()
    except psutil.Error:
        return False


class Job:
    """One job of a trial, seen at whichever node coordinates it."""

    def __init__(self, trial: Trial, name: str) -> None:
        self.trial = trial
        self.name = name
        self.node = 0
        """Who coordinates."""

    def views(self) -> dict[int, JobView]:
        """What every node that ever coordinated it says, as far as they answer."""
        found = {}
        for node in self.trial.swarm.nodes:
            if node.index in self.trial.asleep:
                continue
            try:
                found[node.index] = node.client.job(self.name)
            except SwarmError:  # it does not coordinate the job, or is dead
                if not node.processes():
                    node.drop_client()
        return found

    def until(self, holds: Callable[[JobView], bool], limit_s: float = LIMIT_S) -> JobView:
        """The view of the newest generation as soon as `holds`."""
        deadline_s, view = time.monotonic() + limit_s, None
        while True:
            views = self._views()
            if views:
                self.node = max(sorted(views), key=lambda at: views[at].generation)
                view = views[self.node]
                if holds(view):
                    return view
                assert view.phase not in ("failed", "stopped"), f"{view.phase}: {view.reason}"
            assert time.monotonic() < deadline_s, view
            time.sleep(_LOOK_S)

    def _views(self) -> dict[int, JobView]:
        """As `views`; only of whoever coordinated it last while that one answers."""
        if self.node in self.trial.asleep:
            return self.views()
        try:
            view = self.trial.node(self.node).client.job(self.name)
        except SwarmError:
            return self.views()
        return {self.node: view} if view.phase != "handed over" else self.views()

    def reaches(self, step: int) -> JobView:
        """The view as soon as so many steps are committed; fails if it trains no more then."""
        view = self.until(lambda view: view.step >= step)
        assert view.step < STEPS, "the machine was too fast for the test"
        return view

    def goes_on(self, since: JobView) -> JobView:
        """The view as soon as a later generation has committed a step, or serves.

        What the one before committed since `since` does not count: a step is the later one's own
        if that was seen without it.
        """
        begun: dict[int, int] = {}

        def holds(view: JobView) -> bool:
            if view.generation <= since.generation:
                return False
            first = begun.setdefault(view.generation, view.step)
            return view.step > max(first, since.step) or view.phase == "serving"

        return self.until(holds)

    def hosts(self, view: JobView) -> list[set[int]]:
        """Who hosts a slot of each stage."""
        return [{self.trial.peers.index(peer) for peer in row} for row in view.placement]

    def workers(self, view: JobView) -> list[int]:
        """Those who host a slot and do not coordinate."""
        return sorted(set().union(*self.hosts(view)) - {self.node})

    def worker(self, view: JobView) -> int:
        """The first of them."""
        return self.workers(view)[0]

    @property
    def journal(self) -> Path:
        return self.trial.node(self.node).home / "jobs" / self.name / "journal"

    def records(self) -> list[Record]:
        """What the journal of whoever coordinates says."""
        return read_journal(self.journal)[0]

    def outcome(self) -> Outcome:
        """Wait until the job serves, and end it. No step was ever committed twice."""
        self.until(lambda view: view.phase == "serving")
        found = outcome_at(self.trial.node(self.node).client, self.name)
        commits = [record for record in self.records() if isinstance(record, CommitRecord)]
        assert [commit.step for commit in commits] == list(range(STEPS))
        generations = [record for record in self.records() if isinstance(record, StartedRecord)]
        numbers = [record.generation for record in generations]
        assert numbers == sorted(set(numbers))
        self.stop(generations[-1])
        return found

    def stop(self, last: StartedRecord) -> None:
        """End the job wherever it is known; returns when all whom its last plan names let go."""
        for index, view in self.views().items():
            if view.phase not in ("stopped", "failed", "handed over"):
                self.trial.node(index).client.stop(self.name)
        named = {*last.voters, *last.plan().workers()}
        until(lambda: not self._holders() & named, "everybody lets go of the job")

    def _holders(self) -> set[str]:
        """Nodes on which a child works for the job."""
        role = f"worker:{self.name}"
        views = [node.client.node() for node in self.trial.swarm.nodes if node.processes()]
        return {view.peer for view in views if role in view.pids}


def placings(node: LocalNode, job: str) -> list[dict[str, Any]]:
    """What the node said whenever it began to place the job."""
    lines = (node.home / LOG_FILE).read_text(encoding="utf-8").splitlines()
    found = [line for line in map(json.loads, lines) if line["event"] == "job"]
    return [line for line in found if line["job"] == job and line["phase"] == "placing"]


def committed(records: Sequence[Record]) -> list[tuple[object, ...]]:
    """What was committed, whoever it was that said so."""
    commits = [record for record in records if isinstance(record, CommitRecord)]
    return [(record.step, record.scale, record.loss, record.updates) for record in commits]
