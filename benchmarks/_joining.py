"""How long a newcomer takes to work for a job, and what it costs those who work meanwhile.

Three nodes train; a fourth, on an empty home, joins. As soon as the coordinator sees it, one of the
others that host a slot is asked to end in order, so that the newcomer gets its part whatever the
solver thinks of its speed: it fetches the state while the three go on, then they change places.
Everything runs on one machine; so that the newcomer takes no processor time from the others, which
it would not do at home, those who were there before run on the first core alone, the newcomer and
this program on the last one. The pace before is taken while nobody's solver searches: it does so
after every change, and then once a minute.
The processes that compute can be held to a share of a core each, so that the first core has time
left for the daemons, as a machine has that computes on its GPU.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

import psutil
from _long_job import LIMIT_S, LOOK_S, LongJob, Size
from _shaped import CoreShare
from rich.table import Table

from swarmnode.cli.local_swarm import LocalNode
from swarmnode.errors import SwarmError
from swarmnode.http.api import JobView

NUM_BEFORE = 3
JOIN_SIZE = Size(hidden=128, rows=8, sequence_length=256)
HELD_SIZE = Size(hidden=128, rows=4, sequence_length=128)
"""Computing, not messages, takes most of a step, as it does in any job that is worth a swarm."""
BEFORE_S, AFTER_S = 20.0, 10.0
KNOWN_S = 3.0
"""From when the coordinator's directory shows the newcomer until its job counts on it, at most."""
LEAVE_S = 70.0
CORES = os.sched_getaffinity(0)
_PEERS_S = 0.1
_NUM_IDLE = 3
"""So many looks in a row at a process that sleeps mean that its imports are done."""


WORDS = {
    "answers": "its API answers",
    "visible": "the coordinator sees it",
    "leaving": "another one is asked to end",
    "asked": "it starts the process that computes",
    "imported": "that process has its libraries",
    "state": "the state is on its disk",
    "placed": "it has a part in the plan",
    "commit": "its first step is committed",
    "left": "the other one has ended",
}
PACES = {
    "whole": "until then",
    "answering": "from when it answers",
    "imported": "from when it has libraries and state",
    "after": "afterwards",
}


@dataclass(frozen=True)
class Pace:
    """Step times of a while."""

    num_steps: int
    median_s: float | None
    ratio: float | None
    """Of the median to the one before anybody joined."""
    max_s: float | None


@dataclass(frozen=True)
class Joined:
    """One newcomer. Seconds run from the start of its process, on an empty home."""

    node: int
    answers_s: float
    """Its API answers: the daemon's own start is over."""
    visible_s: float
    """The coordinator sees it in the directory."""
    leaving_s: float
    """Somebody else is asked to end."""
    asked_s: float
    """It has been chosen, and starts the process that will compute."""
    imported_s: float | None
    """That process has its libraries; None where that was not seen before it computed."""
    state_s: float
    """The state that it was told to fetch is on its disk."""
    placed_s: float
    """It is part of the plan, with a slot or as a stage's second holder."""
    commit_s: float
    """The first step with it is committed."""
    left_s: float
    """The process of the one that was asked to end is gone."""
    has_slot: bool
    """Whether it computes; else it holds a stage besides another one."""
    state_bytes: int
    cpu_s: float
    """Processor time of all its processes until then."""
    before: Pace
    whole: Pace
    """From the start of its process to its first step."""
    answering: Pace
    """From when it answers to its first step."""
    imported: Pace | None
    """From the end of all its imports, or of the fetch if that is later, to its first step."""
    after: Pace


@dataclass
class _Seen:
    """What was seen so far, on the clock of this process."""

    start_s: float
    at_s: dict[str, float] = field(default_factory=dict)
    num_idle: int = 0
    has_slot: bool = False
    state_bytes: int = 0
    cpu_s: float = 0.0

    def note(self, what: str) -> None:
        self.at_s.setdefault(what, time.monotonic() - self.start_s)


class _Steps:
    """When steps were committed."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def see(self, view: JobView | None) -> None:
        if view is not None and (not self._seen or view.step > self._seen[-1][1]):
            self._seen.append((time.monotonic(), view.step))

    def pace(self, since_s: float, until_s: float, usual_s: float | None = None) -> Pace:
        """Of the steps that ended in [since_s, until_s)."""
        times: list[float] = []
        for (begin_s, first), (end_s, last) in pairwise(self._seen):
            if since_s <= end_s < until_s:
                times += [(end_s - begin_s) / (last - first)] * (last - first)
        if not times:
            return Pace(0, None, None, None)
        middle = median(times)
        ratio = round(middle / usual_s, 2) if usual_s else None
        return Pace(len(times), round(middle, 4), ratio, round(max(times), 3))


def start_on_one_core(job: LongJob) -> None:
    """The first nodes: a node measures its device again if it finds itself on other cores."""
    os.sched_setaffinity(0, {min(CORES)})
    job.start(range(NUM_BEFORE))


def measure_joins(
    job: LongJob, num_joins: int, shares: Sequence[CoreShare], note: Callable[[str], None]
) -> Iterator[Joined]:
    """One newcomer after another; for each one goes, so that there are three again.

    `shares`, if there are any: what each node's computing is held to, once it is no newcomer.
    """
    known = set(job.peers.values())
    for number in range(num_joins):
        node = job.swarm.node(NUM_BEFORE + number)
        for index, share in enumerate(shares):
            if index in job.live():
                _hold(job.swarm.node(index), share)
        done = _measure(job, node, known)
        note(f"node {node.index} commits after {done.commit_s:.1f} s")
        yield done


def pin(nodes: Iterable[LocalNode], core: int) -> None:
    """Let all that these nodes have started, and will start, run on one core."""
    for node in nodes:
        for process in node.processes():
            with contextlib.suppress(psutil.Error, OSError):
                for thread in process.threads():
                    os.sched_setaffinity(thread.id, {core})


def _measure(job: LongJob, node: LocalNode, known: set[str]) -> Joined:
    steps = _Steps()
    first, last = min(CORES), max(CORES)
    os.sched_setaffinity(0, {last})
    pin((job.swarm.node(index) for index in job.live()), first)
    job.until_healthy()
    job.until_holds(lambda: not _searches(job), "no solver searches")
    begin_s = time.monotonic()
    while time.monotonic() < begin_s + BEFORE_S:
        steps.see(job.look())
        time.sleep(LOOK_S)
    seen = _Seen(time.monotonic())
    job.spawn([node.index])  # on our core
    leaver = _follow(job, node, known, seen, steps)
    end_s = time.monotonic()
    if (status := leaver.wait_stopped(LEAVE_S)) != 0:
        raise SwarmError(f"node {leaver.index} was asked to end, and did so with {status}")
    seen.note("left")
    while time.monotonic() < end_s + AFTER_S:
        steps.see(job.look())
        time.sleep(LOOK_S)
    before = steps.pace(begin_s, seen.start_s)
    usual_s, at_s = before.median_s, seen.at_s
    imported_s = at_s.get("imported")
    ready_s = seen.start_s + max(imported_s or 0.0, at_s["state"])
    return Joined(
        node=node.index,
        **{
            f"{name}_s": round(at_s[name], 2)
            for name in ("answers", "visible", "leaving", "asked", "state")
        },
        imported_s=None if imported_s is None else round(imported_s, 2),
        placed_s=round(at_s["placed"], 2),
        commit_s=round(at_s["commit"], 2),
        left_s=round(at_s["left"], 2),
        has_slot=seen.has_slot,
        state_bytes=seen.state_bytes,
        cpu_s=round(seen.cpu_s, 1),
        before=before,
        whole=steps.pace(seen.start_s, end_s, usual_s),
        answering=steps.pace(seen.start_s + at_s["answers"], end_s, usual_s),
        imported=None if imported_s is None else steps.pace(ready_s, end_s, usual_s),
        after=steps.pace(end_s, end_s + AFTER_S, usual_s),
    )


def _hold(node: LocalNode, share: CoreShare) -> None:
    for process in _running(node, "swarmnode.worker.engine.nursery"):
        share.hold(process.pid)


def _searches(job: LongJob) -> bool:
    module = "swarmnode.coordinator.solver_child"
    return any(_running(job.swarm.node(index), module) for index in job.live())


def _running(node: LocalNode, module: str) -> list[psutil.Process]:
    """The node's processes that run a module, and those that they forked."""
    found = []
    for process in node.processes():
        with contextlib.suppress(psutil.Error):
            if module in process.cmdline():
                found.append(process)
    return found


def _follow(
    job: LongJob, node: LocalNode, known: set[str], seen: _Seen, steps: _Steps
) -> LocalNode:
    """Look at everything until the newcomer's first step is committed; who was asked to end."""
    looked_s, view = 0.0, None
    leaver: LocalNode | None = None
    while leaver is None or "commit" not in seen.at_s:
        if time.monotonic() > seen.start_s + LIMIT_S:
            why = view.plan_verdict if view is not None else ""
            raise SwarmError(f"node {node.index} has no part after {LIMIT_S:.0f} s: {why}")
        view = job.look() or view
        steps.see(view)
        now_s = time.monotonic()
        if now_s - looked_s > _PEERS_S:
            looked_s = now_s
            job.witness.look()
            _look_at_newcomer(job, node, known, seen)
        is_known = now_s - seen.start_s > seen.at_s.get("visible", math.inf) + KNOWN_S
        if leaver is None and view is not None and is_known and "answers" in seen.at_s:
            hosts = {peer for row in view.placement for peer in row}
            able = [i for i in job.live() - {job.node, node.index} if job.peers[i] in hosts]
            if able:
                leaver = job.ask_to_end(min(able))
                seen.note("leaving")
        peer, plan = job.peers.get(node.index), job.witness.plans[-1].plan()
        if view is not None and plan.generation == view.generation and peer in plan.workers():
            seen.note("placed")
            if view.step > job.witness.plans[-1].step and view.phase != "placing":
                seen.has_slot = any(peer in row for row in plan.slots)
                seen.note("state")  # at the latest
                seen.note("commit")
        time.sleep(LOOK_S)
    for process in node.processes():
        with contextlib.suppress(psutil.Error):
            seen.cpu_s += sum(process.cpu_times()[:2])
    return leaver


def _look_at_newcomer(job: LongJob, node: LocalNode, known: set[str], seen: _Seen) -> None:
    if "visible" not in seen.at_s and job.node is not None:
        peers = {peer.peer for peer in job.swarm.node(job.node).client.peers()}
        if peers - known:
            known |= peers
            seen.note("visible")
    if "answers" not in seen.at_s:
        if node.is_ready():
            seen.note("answers")
            job.peers[node.index] = node.client.node().peer
        return
    child = node.client.node().pids.get(f"worker:{job.name}")
    if child is not None:
        seen.note("asked")
        with contextlib.suppress(psutil.Error):
            is_idle = psutil.Process(child).status() == psutil.STATUS_SLEEPING
            seen.num_idle = seen.num_idle + 1 if is_idle else 0
            if seen.num_idle >= _NUM_IDLE:
                seen.note("imported")
    for path in (node.home / "hosted" / job.name).glob("stage-*/*.fetched.safetensors"):
        with contextlib.suppress(OSError):
            seen.state_bytes = max(seen.state_bytes, path.stat().st_size)
            seen.note("state")


def joins_table(done: list[Joined]) -> Table:
    """For people."""
    table = Table("seconds from the start of its process until", *(f"node {j.node}" for j in done))
    for name, what in WORDS.items():
        times = [getattr(each, f"{name}_s") for each in done]
        table.add_row(what, *("-" if at_s is None else f"{at_s:.1f}" for at_s in times))
    table.add_section()
    table.add_row("step before, s", *(f"{each.before.median_s}" for each in done))
    for name in ("whole", "answering", "imported", "after"):
        paces = [getattr(each, name) for each in done]
        cells = [
            "-" if p is None or p.ratio is None else f"{p.ratio} ({p.num_steps})" for p in paces
        ]
        table.add_row(f"median step {PACES[name]}, x before (steps)", *cells)
    table.add_row("longest step, s", *(f"{each.whole.max_s}" for each in done))
    return table
