"""A small job without end on real daemons of this machine, followed through kills and restarts."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from _journals import Witness

from swarmnode.cli.demo_data import write_stdlib_sources
from swarmnode.cli.demo_watch import JobWatch
from swarmnode.cli.local_swarm import LocalNode, LocalSwarm
from swarmnode.config import NodeConfig
from swarmnode.errors import SwarmError
from swarmnode.http.api import JobView

NUM_LAYERS, NUM_STAGES, NUM_SLOTS = 4, 2, 2
CALM_STEPS = 5
"""A generation trains once it has committed so many."""
LIMIT_S = 120.0
SPREAD_S = 20.0
"""So long a healthy swarm may take to give everybody a part, before it counts as it is."""
LOOK_S = 0.02
_LEASE_S = float(NodeConfig.model_fields["lease_s"].default)
_NUM_TRIES = 3


@dataclass(frozen=True)
class Size:
    """How large the job is."""

    hidden: int = 32
    rows: int = 1
    sequence_length: int = 32


def description(text: Path, size: Size, seed: int) -> dict[str, Any]:
    """The job, as a job file would say it: it outlasts every measurement."""
    config = {
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": size.hidden,
        "intermediate_size": 2 * size.hidden,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }
    layers = [NUM_LAYERS // NUM_STAGES] * NUM_STAGES
    return {
        "name": "long",
        "model": {"config": config},
        "data": {"path": str(text), "max_bytes": 1 << 20},
        "batch": {
            "rows": size.rows, "sequence_length": size.sequence_length, "num_microbatches": 4,
        },
        "optimizer": {"learning_rate": 1e-4, "schedule": "constant"},
        "placement": {"stages": NUM_STAGES, "slots": NUM_SLOTS, "layers": layers},
        "run": {
            "steps": 10_000_000, "seed": seed, "deterministic": True, "checkpoint_every": 50,
            "evaluate_microbatches": 1,
        },
    }  # fmt: skip


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def strike(processes: Iterable[psutil.Process]) -> float:
    """SIGKILL them, and say when."""
    at_s = time.monotonic()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return at_s


class LongJob:
    """The job, seen at whichever node coordinates it, and the swarm around it."""

    def __init__(self, swarm: LocalSwarm, folder: Path, size: Size, seed: int) -> None:
        """`folder` is where the text goes. Nothing is started yet."""
        self.swarm = swarm
        self.peers: dict[int, str] = {}
        self._started_at_s: dict[int, float] = {}
        """Wall clock of each node's last start."""
        self._text = folder / "text"
        self._size, self._seed = size, seed
        self._watch = JobWatch(swarm, "")
        self.name = ""
        self.reasons: list[str] = []
        """Why the job stood still, as its coordinators said."""

    def start(self, indices: Sequence[int]) -> None:
        """Start nodes, the first one alone, then the others together; all answer then."""
        for some in (indices[:1], indices[1:]):
            self.spawn(some)
            for index in some:
                self.until_holds(self.swarm.node(index).is_ready, f"node {index} is ready")
                self.peers[index] = self.swarm.node(index).client.node().peer

    def submit(self) -> None:
        """Begin the job, on as many of those who are alive as it has slots."""
        write_stdlib_sources(self._text, 1 << 20, self._seed)
        first = self.swarm.node(min(self.peers))
        job = description(self._text, self._size, self._seed)
        for _ in range(_NUM_TRIES):
            self.name = first.client.submit(job, self._text)
            self._watch = JobWatch(self.swarm, self.name)
            view = self.until(lambda view: view.phase == "training")
            placed = {peer for row in view.placement for peer in row}
            if len(placed) == min(len(self.peers), NUM_STAGES * NUM_SLOTS):
                break
            first.client.stop(self.name)  # nodes that were just started may lose a first stream
        self.witness = Witness([self.journal(index) for index in range(len(self.swarm.nodes))])

    def end(self) -> None:
        """Stop the job, so that its journal is complete."""
        self._watch.client.stop(self.name)
        self.until_holds(lambda: self.look() is None or self._phase == "stopped", "the job stops")

    # ---- the swarm -------------------------------------------------------------------------

    def spawn(self, indices: Iterable[int]) -> None:
        """Start nodes; they join whoever answers."""
        joins = []
        for node in self.swarm.nodes:
            with contextlib.suppress(SwarmError):
                if node.index in self.live():
                    joins += ["--join", node.client.node().join_address]
        for index in indices:
            self._started_at_s[index] = time.time()
            self.swarm.node(index).spawn(*joins)

    def kill(self, index: int) -> float:
        """SIGKILL a node and all that it started, and say when; returns when all are gone."""
        node = self.swarm.node(index)
        processes = node.processes()
        node.was_killed = True
        at_s = strike(processes)
        node.kill()
        del self._started_at_s[index]
        return at_s

    def ask_to_end(self, index: int) -> LocalNode:
        """SIGTERM: the node gives its work to others and ends."""
        node = self.swarm.node(index)
        node.ask_to_stop()
        del self._started_at_s[index]
        return node

    def live(self) -> set[int]:
        """Nodes that were started and not killed since."""
        return set(self._started_at_s)

    def ready(self) -> set[int]:
        """Live nodes that answer. Raises: ChildError if one ended by itself."""
        return {index for index in self.live() if self.swarm.node(index).is_ready()}

    def age_s(self, index: int) -> float:
        return time.time() - self._started_at_s[index]

    # ---- the job ---------------------------------------------------------------------------

    @property
    def node(self) -> int | None:
        """Who coordinates; None while nobody answers for the job."""
        return self._watch.node

    def look(self) -> JobView | None:
        """The view of the newest generation; None while nobody has one."""
        view = self._watch.look(frozenset(self.live()))
        if view is not None and view.reason and view.reason not in self.reasons[-1:]:
            self.reasons.append(view.reason)
        self._phase = view.phase if view is not None else ""
        return view

    def until(self, holds: Callable[[JobView], bool], limit_s: float = LIMIT_S) -> JobView:
        """The first view that `holds`. Raises: SwarmError if there is none in time."""
        deadline_s, seen = time.monotonic() + limit_s, None
        while True:
            view = self.look()
            if view is not None:
                seen = view
                if holds(view):
                    return view
                if view.phase == "failed":
                    raise SwarmError(f"the job failed: {view.reason}")
            if time.monotonic() > deadline_s:
                why = "; ".join(self.reasons[-3:])
                raise SwarmError(f"not within {limit_s:.0f} s: {why}; the last view was {seen}")
            time.sleep(LOOK_S)

    def until_holds(self, holds: Callable[[], bool], what: str) -> None:
        """Look until `holds`. Raises: SwarmError with `what` if it does not in time."""
        deadline_s = time.monotonic() + LIMIT_S
        while not holds():
            if time.monotonic() > deadline_s:
                raise SwarmError(f"not within {LIMIT_S:.0f} s: {what}")
            time.sleep(LOOK_S)

    def next_commit(self, before: JobView) -> JobView:
        """The view as soon as a generation after that of `before` has committed a step."""
        base = before.step

        def is_new(view: JobView) -> bool:
            nonlocal base
            if view.generation <= before.generation or view.phase in ("placing", "waiting"):
                base = max(base, view.step)  # finished by what the old generation had said
                return False
            return view.step > base

        return self.until(is_new)

    def journal(self, index: int) -> Path:
        return self.swarm.node(index).home / "jobs" / self.name / "journal"

    def parts(self) -> list[set[str]]:
        """Who holds each stage by the newest plan; empty before there is one."""
        self.witness.look()
        plans = self.witness.plans
        plan = plans[-1].plan() if plans else None
        return [] if plan is None else [set(plan.holders(s)) for s in range(plan.num_stages)]

    def sees_all(self, index: int) -> bool:
        """Whether a node sees every live one, with an advert of its present life."""
        fresh = {
            peer.peer: time.time() + peer.expires_in_s - _LEASE_S
            for peer in self.swarm.node(index).client.peers()
        }
        return all(
            fresh.get(self.peers[other], 0.0) >= self._started_at_s[other] for other in self.live()
        )

    def until_healthy(self) -> int:
        """Wait until everybody sees everybody, every stage has two holders, and steps are
        committed; how many nodes have a part in it then.

        A node that came back may be left without a part when it would not make the job faster.
        """
        self.until_holds(lambda: self.ready() == self.live(), "all nodes answer")
        self.until_holds(lambda: all(map(self.sees_all, self.live())), "all see each other")
        since_s = time.monotonic()
        while time.monotonic() < since_s + LIMIT_S:
            begun = self.until(lambda view: view.phase == "training")
            enough = begun.step + CALM_STEPS
            view = self.until(
                lambda v, g=begun.generation, n=enough: v.generation != g or v.step >= n
            )
            parts, live = self.parts(), {self.peers[index] for index in self.live()}
            if view.generation != begun.generation or any(len(row & live) < 2 for row in parts):
                continue
            named = set().union(*parts)
            if named >= live or time.monotonic() > since_s + SPREAD_S:
                return len(named)
        raise SwarmError(f"not healthy within {LIMIT_S:.0f} s; the last view was {self.look()}")
