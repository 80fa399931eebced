"""Follows a job through deaths: asks whoever coordinates it, kills and starts again."""

import contextlib
import time
from dataclasses import dataclass, replace

from swarmnode.cli.client import NodeClient
from swarmnode.cli.demo_kills import Killing, Recovered, Restart, Scene, Strike
from swarmnode.cli.display import Display
from swarmnode.cli.local_swarm import LocalSwarm
from swarmnode.cli.show import short
from swarmnode.errors import SwarmError
from swarmnode.http.api import JobView

LOOK_S = 0.05
"""Between two looks at the job."""
ASK_ALL_S = 1.0
"""Between two questions to the nodes that do not coordinate; at once while none does."""
STALL_S = 120.0
"""A job that does not move for so long has failed."""
PATIENCE_S = 30.0
"""For one answer after training, when a node that coordinates may just have been replaced."""


@dataclass(frozen=True)
class Kill:
    """One kill, and how long the swarm took to go on."""

    victim: str
    """The peer id of the node."""
    what: str
    """coordinator (its whole node), node, worker or directory (one child process)."""
    at_step: int
    phase: str
    """Of the job, when it happened."""
    recovery_s: float | None
    """Until the next step was committed, or the job served again; None if it never was."""


class JobWatch:
    """A job as the node that coordinates it sees it, whichever that is at the time."""

    def __init__(self, swarm: LocalSwarm, job: str) -> None:
        self._swarm = swarm
        self._job = job
        self._asked_all_s = 0.0
        self.node: int | None = None
        """Who coordinates; None while nobody answers for the job."""
        self.trouble = ""
        """Why the last node that was asked gave no view."""

    @property
    def client(self) -> NodeClient:
        """Of the node that coordinates. Raises: SwarmError if there is none for long."""
        deadline_s = time.monotonic() + PATIENCE_S
        while self.look(frozenset(range(len(self._swarm.nodes)))) is None or self.node is None:
            if time.monotonic() > deadline_s:
                raise SwarmError(f"no node coordinates job {self._job}: {self.trouble}")
            time.sleep(LOOK_S)
        return self._swarm.node(self.node).client

    def look(self, ready: frozenset[int]) -> JobView | None:
        """The view of the newest generation that any of the `ready` nodes has; None if none has."""
        now_s = time.monotonic()
        asked = ready & {self.node}
        if not asked or now_s - self._asked_all_s >= ASK_ALL_S:
            asked, self._asked_all_s = ready, now_s
        views = {node: view for node in sorted(asked) if (view := self._ask(node)) is not None}
        if not views:
            self.node = None
            return None

        def rank(node: int) -> tuple[int, bool]:
            return views[node].generation, node == self.node

        self.node = max(sorted(views), key=rank)
        return views[self.node]

    def _ask(self, index: int) -> JobView | None:
        node = self._swarm.node(index)
        if node.was_killed:
            return None
        try:
            return node.client.job(self._job)
        except SwarmError as error:  # it does not coordinate the job, or is about to be seen dead
            self.trouble = str(error)
            return None


class Trial:
    """Watches a job until it serves, and kills on the way what `killing` says."""

    def __init__(
        self, swarm: LocalSwarm, watch: JobWatch, killing: Killing, display: Display
    ) -> None:
        self._swarm = swarm
        self._watch = watch
        self._killing = killing
        self._display = display
        self._peers = [node.client.node().peer for node in swarm.nodes]
        self._ready = frozenset(range(len(swarm.nodes)))
        self._view: JobView | None = None
        self._began_s: float | None = None
        self.training_s = 0.0
        """From the first step's begin to the last step's commit."""
        self.kills: list[Kill] = []

    def run(self) -> JobView:
        """Returns the view of the job that serves, after every kill has been recovered from.

        Raises: SwarmError if the job fails or stands still, or if a node ends by itself.
        """
        moved, moved_at_s = self._seen(), time.monotonic()
        while True:
            self._swarm.check()
            self._welcome()
            view = self._watch.look(self._ready)
            now_s = time.monotonic()
            if view is not None:
                self._view = view
                self._display.show(view)
                self._measure(view, now_s)
                if view.phase in ("failed", "stopped"):
                    raise SwarmError(f"the job is {view.phase}: {view.reason or 'it says not why'}")
            for effect in self._killing.handle(self._scene(), now_s):
                self._perform(effect)
            if view is not None and view.phase == "serving":
                if self._killing.is_over:
                    return view
                self._refuse_impossible(view)
            if self._seen() != moved:
                moved, moved_at_s = self._seen(), now_s
            elif now_s - moved_at_s > STALL_S:
                phase, step, _ = moved
                raise SwarmError(f"the job does not move: {phase} at step {step}")
            time.sleep(LOOK_S)

    def _seen(self) -> tuple[str, int, int]:
        """What changes while a job moves: phase, committed steps, generation."""
        view = self._view
        return (view.phase, view.step, view.generation) if view is not None else ("waiting", 0, 0)

    def _refuse_impossible(self, view: JobView) -> None:
        """A lone worker is to be killed while training; later it would show nothing."""
        hosts = {peer for row in view.placement for peer in row}
        if self._killing.next_aim == "worker" and hosts == {self._peers[self._watch.node or 0]}:
            raise SwarmError("one node hosts everything, so none can be lost")

    def _measure(self, view: JobView, now_s: float) -> None:
        if self._began_s is None and view.phase == "training":
            self._began_s = now_s
        if view.step < view.num_steps or not self.training_s:
            self.training_s = now_s - (self._began_s or now_s)

    def _welcome(self) -> None:
        """See who of those that were started again answers."""
        for node in self._swarm.nodes:
            if node.index not in self._ready and not node.was_killed and node.is_ready():
                self._ready |= {node.index}
                self._display.note(f"node {node.index} is back")

    def _scene(self) -> Scene:
        view = self._view
        coordinator = self._watch.node
        if view is None:
            return Scene("waiting", 0, None, 0, coordinator, (), self._ready)
        stages = tuple(
            frozenset(self._peers.index(peer) for peer in row if peer in self._peers)
            for row in view.placement
        )
        return Scene(
            view.phase, view.step, view.step_s, view.generation, coordinator, stages, self._ready
        )

    # ---- doing it --------------------------------------------------------------------------

    def _perform(self, effect: Strike | Restart | Recovered) -> None:
        match effect:
            case Strike():
                self._strike(effect)
            case Restart(node=index):
                self._swarm.node(index).spawn(*self._joins())
                self._display.note(f"node {index} is started again")
            case Recovered(kill=number, recovery_s=recovery_s):
                self.kills[number] = replace(self.kills[number], recovery_s=round(recovery_s, 3))
                step = self._view.step if self._view is not None else 0
                self._display.note(
                    f"the job goes on at step {step}, {recovery_s:.1f} s after the kill"
                )

    def _joins(self) -> list[str]:
        """How to join: by everybody who answers, as some may be about to be killed."""
        args = []
        for index in sorted(self._ready):
            with contextlib.suppress(SwarmError):
                args += ["--join", self._swarm.node(index).client.node().join_address]
        return args

    def _strike(self, strike: Strike) -> None:
        node, view = self._swarm.node(strike.node), self._view
        step, phase = (view.step, view.phase) if view is not None else (0, "waiting")
        what = "coordinator" if strike.coordinates else strike.part
        if strike.part == "node":
            self._ready -= {strike.node}
            node.kill()
        elif not node.kill_child(strike.part):
            self._killing.missed()
            return
        peer = self._peers[strike.node]
        self.kills.append(Kill(peer, what, step, phase, None))
        named = "node" if strike.part == "node" else f"the {strike.part} process of node"
        role = ", which coordinates," if strike.coordinates else ""
        self._display.note(
            f"killed {named} {strike.node} ({short(peer)}){role} at step {step} while {phase}"
        )
