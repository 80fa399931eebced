"""How long a swarm stands still when something of it is killed, and when somebody joins it.

    python benchmarks/recovery.py --kills 100 [--roles leave ...] [--json]
    python benchmarks/recovery.py --part join --joins 5 [--hidden 256] [--json]

Real daemons on this machine's loopback train a small model, 2 stages x 2 slots, without end.
`kills`: four nodes; in turn SIGKILL goes to

  child      the torch process of a node that hosts a slot
  node       a whole node that hosts a slot and does not coordinate; started again after recovery
  directory  the directory process of a node
  restart    the whole node that coordinates, started again at once
  takeover   the whole node that coordinates, started again after another one has taken over; where
             the plan has two voters, so that the other one may not, it counts as a restart
  leave      (only where --roles names it) a node as in `node`, but by SIGTERM: it gives its slots
             to others and ends; started again after that
  resign     (the same) the node that coordinates, by SIGTERM: it gives its place away too

and the time runs from the signal until the coordinator's API shows a step that a later generation
has committed (`directory`, `leave` and `resign`, where nobody need wait for one: the longest time
without a commit until the process is there again, or has ended). Looked at every 20 ms. Before each
kill the coordinator sees all four nodes again and every stage has two holders. `join`: see
_joining.py.

In the end the journals must hold every step once, with the same bits wherever a step was written
down twice, and 95 % of the kills must be recovered from within what is promised (`ASKED_S`); else
the exit status is 1.
"""

import argparse
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from _environment import environment
from _joining import (
    HELD_SIZE,
    JOIN_SIZE,
    NUM_BEFORE,
    joins_table,
    measure_joins,
    start_on_one_core,
)
from _long_job import (
    LIMIT_S,
    LOOK_S,
    LongJob,
    Size,
    percentile,
    strike,
)
from _shaped import core_share, why_no_shares
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from swarmnode.cli.local_swarm import LocalSwarm
from swarmnode.errors import SwarmError
from swarmnode.http.api import JobView

KILLS = ("child", "node", "directory", "restart", "takeover")
ROLES = (*KILLS, "leave", "resign")
ASKED_S = {"child": 8.0, "node": 8.0, "restart": 10.0, "takeover": 20.0}
NUM_NODES = 4
MOST_PAUSE_S = 1.0
"""A kill waits a random part of it, so that it hits any moment of a step."""


@dataclass(frozen=True)
class Recovery:
    """One kill on a healthy swarm."""

    role: str
    node: int
    step: int
    generation: int
    num_parts: int
    """Nodes that held a part of the job when it was hit."""
    commit_s: float
    """From the kill to the next commit that counts, or the longest time without one."""
    from_start_s: float | None = None
    """From the start of the coordinator's node to that commit; only of `restart`."""
    back_s: float | None = None
    """From the kill until the directory process is there again; only of `directory`."""
    ended_s: float | None = None
    """From the signal until the node's process has ended; only of `leave` and `resign`."""


class Kills:
    """One kill after another, each on a healthy swarm."""

    def __init__(self, job: LongJob, roles: Sequence[str], seed: int) -> None:
        """`roles` in turn."""
        self._job = job
        self._roles = roles
        self._chance = random.Random(seed)
        self._num_parts = NUM_NODES

    def run(self, num_kills: int, note: Callable[[str], None]) -> Iterator[Recovery]:
        for number in range(num_kills):
            role = self._roles[number % len(self._roles)]
            self._num_parts = self._job.until_healthy()
            self._job.witness.look()
            time.sleep(self._chance.uniform(0.0, MOST_PAUSE_S))
            done: Recovery = getattr(self, f"_{role}")()
            note(f"{done.role} of node {done.node} at step {done.step}: {done.commit_s:.2f} s")
            yield done

    def _child(self) -> Recovery:
        view = self._training()
        node = self._chance.choice(self._hosts(view))
        process = self._job.swarm.node(node).child("worker")
        assert process is not None, f"node {node} hosts a slot without a process"
        view = self._training()
        at_s = strike([process])
        return self._done("child", node, view, at_s)

    def _node(self) -> Recovery:
        hosts = self._hosts(self._training())
        node = self._chance.choice([n for n in hosts if n != self._job.node])
        view = self._training()
        at_s = self._job.kill(node)
        done = self._done("node", node, view, at_s)
        self._job.spawn([node])
        return done

    def _directory(self) -> Recovery:
        job, node = self._job, self._chance.randrange(NUM_NODES)
        client, process = job.swarm.node(node).client, job.swarm.node(node).child("directory")
        assert process is not None, f"node {node} has no directory"
        view = self._training()
        at_s = strike([process])
        longest_s, back_s = self._pause(
            view, at_s, lambda: client.node().pids["directory"] != process.pid
        )
        return Recovery(
            "directory", node, view.step, view.generation, self._num_parts, longest_s, back_s=back_s
        )

    def _leave(self) -> Recovery:
        hosts = self._hosts(self._training())
        return self._asked("leave", self._chance.choice([n for n in hosts if n != self._job.node]))

    def _resign(self) -> Recovery:
        self._training()
        return self._asked("resign", self._coordinator())

    def _asked(self, role: str, node: int) -> Recovery:
        job = self._job
        view = self._training()
        at_s = time.monotonic()
        leaver, statuses = job.ask_to_end(node), list[int]()

        def has_ended() -> bool:
            if (status := leaver.wait_stopped(0)) is not None:
                statuses.append(status)
            return bool(statuses)

        longest_s, ended_s = self._pause(view, at_s, has_ended)
        seen = job.look()
        if statuses != [0] or seen is None or seen.generation == view.generation:
            raise SwarmError(f"node {node} ended with {statuses}; the view then was {seen}")
        job.spawn([node])
        return Recovery(
            role, node, view.step, view.generation, self._num_parts, longest_s, ended_s=ended_s
        )

    def _pause(
        self, before: JobView, at_s: float, is_over: Callable[[], bool]
    ) -> tuple[float, float]:
        """The longest time without a commit from `at_s` until it `is_over` and a step is done; and
        from `at_s` until it was over."""
        step, longest_s, moved_s = before.step, 0.0, at_s
        over_s: float | None = None
        while over_s is None or step == before.step:
            seen, now_s = self._job.look(), time.monotonic()
            if seen is not None and seen.step > step:
                longest_s, moved_s, step = max(longest_s, now_s - moved_s), now_s, seen.step
            if over_s is None and is_over():
                over_s = now_s - at_s
            if now_s > at_s + LIMIT_S:
                raise SwarmError(f"it is not over, or no commit, within {LIMIT_S:.0f} s")
            time.sleep(LOOK_S)
        return max(longest_s, time.monotonic() - moved_s), over_s

    def _restart(self) -> Recovery:
        view = self._training()
        node = self._coordinator()
        at_s = self._job.kill(node)
        started_s = time.monotonic()
        self._job.spawn([node])
        done = self._done("restart", node, view, at_s)
        return replace(done, from_start_s=done.commit_s - (started_s - at_s))

    def _takeover(self) -> Recovery:
        if len(self._job.witness.plans[-1].voters) < 3:
            return self._restart()
        view = self._training()
        node = self._coordinator()
        at_s = self._job.kill(node)
        done = self._done("takeover", node, view, at_s)
        assert self._job.node != node
        self._job.spawn([node])
        return done

    def _training(self) -> JobView:
        return self._job.until(lambda view: view.phase == "training")

    def _coordinator(self) -> int:
        assert self._job.node is not None
        return self._job.node

    def _hosts(self, view: JobView) -> list[int]:
        peers = {peer for row in view.placement for peer in row}
        return sorted(index for index, peer in self._job.peers.items() if peer in peers)

    def _done(self, role: str, node: int, view: JobView, at_s: float) -> Recovery:
        self._job.next_commit(view)
        taken_s = time.monotonic() - at_s
        return Recovery(role, node, view.step, view.generation, self._num_parts, taken_s)


def spread(values: list[float]) -> dict[str, float]:
    """What is said of the seconds of one role."""
    return {
        "num": len(values),
        "p50_s": round(median(values), 3),
        "p95_s": round(percentile(values, 0.95), 3),
        "max_s": round(max(values), 3),
    }


def by_role(done: list[Recovery]) -> dict[str, dict[str, float]]:
    """The figures of each role, and both other clocks."""
    found = {}
    for role in ROLES:
        mine = [each for each in done if each.role == role]
        clocks = {
            role: [each.commit_s for each in mine],
            f"{role}, from its start": [e.from_start_s for e in mine if e.from_start_s is not None],
            f"{role}, process back": [e.back_s for e in mine if e.back_s is not None],
            f"{role}, process ended": [e.ended_s for e in mine if e.ended_s is not None],
        }
        found |= {name: spread(seconds) for name, seconds in clocks.items() if seconds}
    return found


def too_late(roles: dict[str, dict[str, float]]) -> list[str]:
    """Roles of which more than one kill in twenty took longer than is promised."""
    return [role for role, row in roles.items() if row["p95_s"] > ASKED_S.get(role, math.inf)]


def kills_table(roles: dict[str, dict[str, float]]) -> Table:
    """For people."""
    table = Table("killed", "times", "p50, s", "p95, s", "max, s", title="until the next commit")
    for role, row in roles.items():
        table.add_row(
            role, str(row["num"]), *(f"{row[k]:.2f}" for k in ("p50_s", "p95_s", "max_s"))
        )
    return table


@contextmanager
def folder(keep: Path | None) -> Iterator[Path]:
    """Where everything goes; it stays if it is to be kept, or if something fails."""
    root = keep or Path(tempfile.mkdtemp(prefix="swarmnode-recovery-"))
    try:
        yield root
    except BaseException:
        print(f"homes and logs are kept in {root}", file=sys.stderr)
        raise
    if keep is None:
        shutil.rmtree(root, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("kills", "join"), default="kills")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=KILLS)
    parser.add_argument("--joins", type=int, default=5)
    parser.add_argument(
        "--hidden", type=int, help="size of the model; each part has its own unless given"
    )
    parser.add_argument(
        "--core-share", type=float, default=0.0, help="of a core, to compute with in joins"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a folder for homes and logs, which then stay")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    is_join = options.part == "join"
    num_nodes = NUM_BEFORE + options.joins if is_join else NUM_NODES
    total = options.joins if is_join else options.kills
    if options.core_share and (problem := why_no_shares()):
        parser.error(f"--core-share {problem}")
    size = (HELD_SIZE if options.core_share else JOIN_SIZE) if is_join else Size()
    if options.hidden:
        size = replace(size, hidden=options.hidden)
    console = Console(stderr=True)
    with (
        folder(options.keep) as root,
        ExitStack() as groups,
        LocalSwarm(root, num_nodes) as swarm,
        Progress(console=console) as progress,
    ):
        task = progress.add_task(options.part, total=total)
        job = LongJob(swarm, root, size, options.seed)
        shares = [
            groups.enter_context(core_share(f"node-{index}", options.core_share))
            for index in range(num_nodes if options.core_share else 0)
        ]
        if is_join:
            start_on_one_core(job)
        else:
            job.start(range(NUM_NODES))
        job.submit()
        done: list[Any] = []
        measured = (
            measure_joins(job, options.joins, shares, progress.console.print)
            if is_join
            else Kills(job, options.roles, options.seed).run(options.kills, progress.console.print)
        )
        for each in measured:
            done.append(each)
            progress.advance(task)
        job.until_healthy()
        coordinator = job.node
        assert coordinator is not None
        job.end()
        faults = job.witness.verdict(job.journal(coordinator))
        if faults:
            raise SwarmError("; ".join(faults[:5]))
    if is_join:
        figures: dict[str, Any] = {"joins": [asdict(each) for each in done]}
    else:
        hit = dict(sorted(Counter(each.num_parts for each in done).items()))
        figures = {"kills": len(done), "roles": by_role(done), "by_nodes_with_a_part": hit}
    line = {
        "bench": "recovery",
        "part": options.part,
        "seed": options.seed,
        "size": asdict(size),
        "core_share": options.core_share,
        **figures,
        "steps_committed_once": job.witness.num_steps,
        "generations": job.witness.generation,
        **environment(["torch", "hivemind", "libp2p"]),
    }
    if options.json:
        print(json.dumps(line))
    else:
        Console().print(joins_table(done) if is_join else kills_table(by_role(done)))
    late = [] if is_join else too_late(by_role(done))
    if late:
        print(f"slower than promised: {', '.join(late)}", file=sys.stderr)
    return 1 if late else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SwarmError as error:
        sys.exit(f"recovery: {error}")
