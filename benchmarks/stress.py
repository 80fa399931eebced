"""A swarm that trains while something of it is killed, or a dead node started, every two seconds.

    python benchmarks/stress.py [--seconds 600] [--draw [docs/stress.svg]] [--json]

Six daemons on this machine's loopback train a small model, 2 stages x 2 slots, without end. At each
beat, by a seed, either a dead node is started again on its home, or SIGKILL goes to a whole node
(the coordinator's too), to the torch process of one, or to the directory process of one. A node is
spared while its death would leave a stage of the newest plan, or of the newest begun one, without
a holder that answers, or those plans without a majority of their voters, or the swarm with a single
node: what swarmnode promises (docs/guarantees.md) needs as much. Nothing else is spared: kills hit
a swarm that still recovers from the kills before.

Exit status 1, and one line for each, if a daemon ends by itself; if no step is committed for 30 s;
if a journal lacks a step, has one twice, or with other bits than another journal; or if memory,
file descriptors or the homes' disk space in the last third of the run lie above the second third by
more than _footprint.py allows (daemons compared at the same age, as none lives long).
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from _environment import environment
from _footprint import (
    NodeSample,
    SwarmSample,
    disk_of,
    growth,
    sample_node,
    verdicts,
)
from _long_job import LongJob, Size, percentile
from rich.console import Console
from rich.progress import Progress

from swarmnode.cli.local_swarm import LocalSwarm
from swarmnode.coordinator.events import StartedRecord
from swarmnode.errors import SwarmError

MOST_GAP_S = 30.0
START_SHARE = 0.5
"""How often a beat starts a dead node, where there is one."""
PARTS: tuple[Literal["node", "worker", "directory"], ...] = ("node", "worker", "directory")
FEWEST_NODES = 2
LOOK_S = 0.1
What = Literal["node", "coordinator", "worker", "directory", "start"]


@dataclass(frozen=True)
class Beat:
    """What was done to the swarm."""

    at_s: float
    what: What
    node: int


def may_go(peer: str, ready: set[str], plans: Iterable[StartedRecord]) -> bool:
    """Whether the death of `peer` leaves what the guarantees ask for among the `ready`."""
    left = ready - {peer}
    return len(left) >= FEWEST_NODES and all(
        all(left & set(plan.holders(stage)) for stage in range(plan.num_stages))
        and 2 * len(left & set(plan.voters)) > len(plan.voters)
        for plan in (record.plan() for record in plans)
    )


class Stress:
    """One run: its beats, its commits, its samples."""

    def __init__(self, job: LongJob, options: argparse.Namespace) -> None:
        self._job = job
        self._options = options
        self._chance = random.Random(options.seed)
        self._begin_s = time.monotonic()
        self._step = -1
        self.commits: list[tuple[float, int]] = []
        """(when, committed steps), whenever the number grew."""
        self.beats: list[Beat] = []
        self.nodes: list[NodeSample] = []
        self.swarm: list[SwarmSample] = []
        self.fewest_alive = options.nodes

    @property
    def now_s(self) -> float:
        return time.monotonic() - self._begin_s

    def run(self, progress: Progress) -> None:
        """Until the time is over. Raises: SwarmError if a daemon ends by itself."""
        options, task = self._options, progress.add_task("stress", total=self._options.seconds)
        beat_s, sample_s = options.every_s, 0.0
        while (now_s := self.now_s) < options.seconds:
            self.look()
            if now_s >= beat_s:
                beat_s += options.every_s
                self._beat()
                note = f"{self._step} steps, {len(self.beats)} beats, {len(self._job.live())} alive"
                progress.update(task, completed=now_s, description=note)
            if now_s >= sample_s:
                sample_s += options.sample_s
                self._sample()
            time.sleep(LOOK_S)

    def look(self) -> None:
        """See whether something was committed. Raises: SwarmError if the job has failed."""
        self._job.swarm.check()
        view = self._job.look()
        if view is not None and view.phase == "failed":
            raise SwarmError(f"the job failed: {view.reason}")
        if view is not None and view.step > self._step:
            self._step = view.step
            self.commits.append((self.now_s, view.step))

    def gaps_s(self) -> list[float]:
        """Times between commits, the last one until now."""
        times = [at_s for at_s, _ in self.commits]
        return [later - at_s for at_s, later in zip(times, [*times[1:], self.now_s], strict=True)]

    # ---- beats -----------------------------------------------------------------------------

    def _beat(self) -> None:
        dead = sorted(set(range(self._options.nodes)) - self._job.live())
        if dead and self._chance.random() < START_SHARE:
            return self._start(self._chance.choice(dead))
        part = self._chance.choice(PARTS)
        return self._kill_node(dead) if part == "node" else self._kill_child(part)

    def _start(self, node: int) -> None:
        self._job.spawn([node])
        self._note("start", node)

    def _kill_node(self, dead: list[int]) -> None:
        """Some node that may go; where none may, a dead one is started."""
        job = self._job
        job.witness.look()
        plans, ready = job.witness.plans, job.ready()
        peers = {job.peers[node] for node in ready}
        able = [node for node in sorted(ready) if may_go(job.peers[node], peers, plans)]
        if not able:
            return self._start(self._chance.choice(dead)) if dead else None
        node = self._chance.choice(able)
        what: What = "coordinator" if node == job.node else "node"
        job.kill(node)
        self.fewest_alive = min(self.fewest_alive, len(job.live()))
        return self._note(what, node)

    def _kill_child(self, what: Literal["worker", "directory"]) -> None:
        """Of some node that has one."""
        nodes = sorted(self._job.ready())
        for node in self._chance.sample(nodes, len(nodes)):
            if self._job.swarm.node(node).kill_child(what):
                return self._note(what, node)
        return None

    def _note(self, what: What, node: int) -> None:
        self.beats.append(Beat(round(self.now_s, 2), what, node))

    # ---- samples ---------------------------------------------------------------------------

    def _sample(self) -> None:
        job, at_s = self._job, self.now_s
        job.witness.look()
        found = []
        for index in sorted(job.ready()):
            node = job.swarm.node(index)
            daemon = node.client.node().pids["daemon"]
            found.append(sample_node(at_s, index, job.age_s(index), daemon, node.processes()))
        here = [sample for sample in found if sample is not None]
        self.nodes += here
        num_bytes, num_files = disk_of(node.home for node in job.swarm.nodes)
        uss, fds = sum(s.uss_bytes for s in here), sum(s.fds for s in here)
        self.swarm.append(SwarmSample(at_s, len(here), uss, fds, num_bytes, num_files))


def report(run: Stress, job: LongJob, seconds: float) -> tuple[dict[str, Any], list[str]]:
    """The figures, and what is wrong."""
    gaps, flat = run.gaps_s(), verdicts(run.nodes, run.swarm, seconds)
    faults = []
    if max(gaps) > MOST_GAP_S:
        faults.append(f"nothing was committed for {max(gaps):.1f} s")
    faults += [
        f"{name} grew from {each.second:.4g} to {each.last:.4g}"
        for name, each in flat.items()
        if not each.is_flat
    ]
    slopes = {
        "daemon_uss_bytes": growth(run.nodes, lambda s: s.daemon_uss_bytes),
        "daemon_fds": growth(run.nodes, lambda s: s.daemon_fds),
    }
    figures = {
        "beats": dict(sorted(Counter(beat.what for beat in run.beats).items())),
        "fewest_alive": run.fewest_alive,
        "steps": job.witness.num_steps,
        "generations": job.witness.generation,
        "gap_max_s": round(max(gaps), 2),
        "gap_p95_s": round(percentile(gaps, 0.95), 2),
        "standing_s": round(sum(gap for gap in gaps if gap > 1.0), 1),
        "flat": {name: {**asdict(each), "is_flat": each.is_flat} for name, each in flat.items()},
        "growth_per_minute_of_life": slopes,
    }
    return figures, faults


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--every-s", type=float, default=2.0, help="between two beats")
    parser.add_argument("--sample-s", type=float, default=10.0)
    parser.add_argument("--nodes", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=32, help="size of the model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a folder for homes and logs, which then stay")
    parser.add_argument("--draw", type=Path, nargs="?", const=Path("docs/stress.svg"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    root = options.keep or Path(tempfile.mkdtemp(prefix="swarmnode-stress-"))
    faults: list[str] = []
    with LocalSwarm(root, options.nodes) as swarm, Progress(console=Console(stderr=True)) as bar:
        job = LongJob(swarm, root, Size(options.hidden), options.seed)
        job.start(range(options.nodes))
        job.submit()
        run = Stress(job, options)
        try:
            run.run(bar)
            job.spawn(set(range(options.nodes)) - job.live())
            job.until_healthy()
            run.look()
            coordinator = job.node
            assert coordinator is not None
            job.end()
            faults += job.witness.verdict(job.journal(coordinator))
        except SwarmError as error:
            faults += [*job.witness.faults, str(error)]
    figures, more = report(run, job, options.seconds)
    faults += more
    for fault in faults:
        print(f"stress: {fault}", file=sys.stderr)
    case = {"bench": "stress", "seconds": options.seconds, "seed": options.seed}
    line = {**case, **figures, "faults": faults, **environment(["torch", "hivemind", "libp2p"])}
    print(json.dumps(line) if options.json else json.dumps(line, indent=1))
    if options.draw is not None:
        from _stress_picture import draw

        draw(run.commits, run.beats, run.nodes, run.swarm, options.draw)
    if options.keep is None and not faults:
        shutil.rmtree(root, ignore_errors=True)
    elif faults:
        print(f"homes and logs are kept in {root}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
