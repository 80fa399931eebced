"""The worker child's keeper in a simulated daemon: states and updates brought here, a child made
ready for each generation, as in `worker.child_host`."""

import zlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING

from swarmnode.domain import BlobRef, Generation, PeerId, Plan
from swarmnode.engine_messages import Base, Configure, Configured, EngineMessage, Export, Exported
from swarmnode.errors import DataError, SwarmError
from swarmnode.manifest import Manifest
from swarmnode.messages import (
    Applied,
    Assign,
    Commit,
    Evaluated,
    Failed,
    Frame,
    LinkBroken,
    LinkReport,
    Message,
    Placed,
    Prepare,
    Prepared,
    Ready,
    Saved,
    StateSource,
    Traffic,
)
from swarmnode.simulation.child import Child
from swarmnode.simulation.keeping import SimKeeper
from swarmnode.simulation.world import Script
from swarmnode.updates import UpdateIndex
from swarmnode.worker.assigning import plan_handoffs
from swarmnode.worker.files import state_path
from swarmnode.worker.handoff import Handoff
from swarmnode.worker.state_keeper import base_of

if TYPE_CHECKING:
    from swarmnode.simulation.daemon import Daemon

Handoffs = dict[int, tuple[Handoff, StateSource]]
SWING_S = 90.0
"""A link is slow for half of that, and fast for the other."""
SLOW_BYTES_PER_S, FAST_BYTES_PER_S = 40.0, 1e9
"""A frame of the toy model is some 130 bytes: one line stalls a step for seconds, the other never.
"""


def swinging_rate(source: PeerId, target: PeerId, now_s: float) -> float:
    """Bytes per second; each link has a rhythm of its own."""
    shift = zlib.crc32(f"{source} {target}".encode()) % 1000 / 1000
    return SLOW_BYTES_PER_S if (now_s / SWING_S + shift) % 1 < 0.5 else FAST_BYTES_PER_S


class SimChildHost:
    """Carries out plans with a child of its own; what it has to say goes to `post`."""

    def __init__(
        self,
        daemon: "Daemon",
        manifest: Manifest,
        keeper: SimKeeper,
        post: Callable[[Message], None],
    ) -> None:
        self.plan: Plan | None = None
        """The plan that is carried out now; frames of it are taken."""
        self._daemon = daemon
        self._me = PeerId(daemon.name)
        self._manifest = manifest
        self._keeper = keeper
        self._post = post
        self._child: Child | None = None
        self._num_tasks = 0
        """Assignments and preparations that were begun: only the last one goes on."""
        self._is_assigning = self._is_configuring = False
        self._wanted: dict[tuple[int, int], Generation] = {}
        """States to publish as soon as the child has written them: (stage, step)."""
        self._taking: dict[int, Handoff] = {}

    @property
    def is_warm(self) -> bool:
        """Whether a child runs."""
        return self._child is not None

    # ---- what it is to do ------------------------------------------------------------------

    def carry_out(self, assign: Assign) -> None:
        """Go over to the plan of `assign`; what goes on about an earlier one is given up."""
        self.plan = assign.plan
        self._daemon.join(self._manifest.job, assign.plan)
        self._is_assigning = True
        self._start(self._assign(assign))

    def prepare(self, prepare: Prepare) -> None:
        """Fetch what a later plan will need, and have a child that is ready to compute."""
        if not self._is_assigning:
            self._start(self._prepare(prepare))

    def _start(self, script: Script) -> None:
        """Run a script in place of the one before."""
        self._num_tasks += 1
        self._daemon.start(self._while_it_is_the_last(script, self._num_tasks))

    def _while_it_is_the_last(self, script: Script, number: int) -> Script:
        for wait_s in script:
            yield wait_s
            if number != self._num_tasks:
                return

    def _prepare(self, prepare: Prepare) -> Script:
        plan, keeper = prepare.plan, self._keeper
        assign = Assign(self._manifest.job, plan, prepare.step, prepare.sources, b"")
        try:
            self._start_child()
            stages = keeper.expect(stage for stage, _ in prepare.sources)
            planned = plan_handoffs(assign, self._me, self._manifest, keeper, stages)
            yield from self._gather(plan, planned)
        except (SwarmError, OSError) as error:
            self._daemon.note(f"not prepared: {error}")
            failure = str(error)[:300] or type(error).__name__
            self._post(Prepared(self._manifest.job, plan.generation, prepare.step, failure))
        else:
            self._post(Prepared(self._manifest.job, plan.generation, prepare.step))

    def stop(self) -> None:
        """End the child, and with it what only its memory holds."""
        self._num_tasks += 1
        self._is_assigning = False
        self._daemon.leave(self._manifest.job)
        self._drop_child()
        self.plan = None

    def crash(self) -> None:
        """The child dies; the daemon says so."""
        if self._child is not None:
            self._drop_child()
            generation = self.plan.generation if self.plan else Generation(0)
            reason = "the worker child ended"
            self._post(Failed(self._manifest.job, generation, reason, child_ended=True))

    def _drop_child(self) -> None:
        if self._child is not None:
            self._child.lives = False
            self._child = None
        self._keeper.memory.clear()

    # ---- an assignment ---------------------------------------------------------------------

    def _assign(self, assign: Assign) -> Script:
        """Bring every stage to the assigned step, then make the child ready."""
        job, plan, keeper = self._manifest.job, assign.plan, self._keeper
        try:
            planned = plan_handoffs(assign, self._me, self._manifest, keeper)
            bases = yield from self._gather(plan, planned)
        except (SwarmError, OSError) as error:
            self._is_assigning = False
            self._post(Failed(job, plan.generation, str(error)[:300]))
            return
        self._is_assigning, self._is_configuring = False, True
        self._taking = {stage: taken for stage, (taken, _) in planned.items()}
        self._start_child()
        self.to_child(
            Configure(job, self._me, plan, assign.step, bases, "", str(keeper.directory), 1, "cpu")
        )

    def _start_child(self) -> None:
        if self._child is None:
            self._child = self._daemon.spawn(self._manifest, self._from_child)

    def _gather(self, plan: Plan, planned: Handoffs) -> Generator[float, None, tuple[Base, ...]]:
        """Fetch what is missing. Raises: SwarmError, OSError."""
        section, keeper = self._daemon.swarm.section(self._manifest.job), self._keeper
        disk, bases = self._daemon.machine.disk, []
        for stage, (taken, source) in planned.items():
            if taken.how == "fetch":
                assert source.index is not None
                path = state_path(keeper.directory, stage, taken.step, "fetched")
                data = yield from self._fetch(source.index, plan, source, section.state_mb * 1e6)
                yield disk.sync_s
                disk.replace(str(path), data)
            for update in taken.to_fetch:
                index = yield from self._fetch(update.ref, plan, source, 0.0)
                chunks: list[bytes] = []
                for chunk in UpdateIndex.from_json(index).chunks:
                    data = yield from self._fetch(chunk, plan, source, section.update_mb * 1e6)
                    chunks.append(data)
                keeper.log(stage).write(update.step, chunks)
            for update in taken.to_fetch:
                keeper.logged(stage, update.step)
            bases.append(base_of(stage, taken, keeper))
        return tuple(bases)

    def _fetch(
        self, ref: BlobRef, plan: Plan, source: StateSource, real_bytes: float
    ) -> Generator[float, None, bytes]:
        """From the providers, and if they fail from anybody in the plan."""
        daemon = self._daemon
        everybody = dict.fromkeys((*source.providers, plan.coordinator, *plan.workers()))
        data = yield from daemon.swarm.blobs.fetch(
            daemon.machine, ref, tuple(everybody), real_bytes
        )
        if data is None:
            raise DataError(f"nobody gives {ref.sha256[:8]}, among {tuple(everybody)}")
        return data

    # ---- the child -------------------------------------------------------------------------

    def to_child(self, message: Message | EngineMessage, payload: bytes = b"") -> None:
        """Hand a message to the child, if there is one."""
        if self._child is not None:
            self._child.handle(message, payload)

    def commit(self, commit: Commit) -> None:
        """Let the child apply a step."""
        memory = self._keeper.memory
        for stage in [stage for stage, step in memory.items() if step == commit.step]:
            memory[stage] = commit.step + 1
        self.to_child(commit)

    def save(self, generation: Generation, step: int, stage: int) -> None:
        """Publish the state of that step from the disk; if it is not there yet, ask for it."""
        if self._keeper.file(stage, step) is not None:
            self._publish(generation, step, stage)
            return
        self._wanted[stage, step] = generation
        path = str(state_path(Path(str(self._keeper.directory)), stage, step, "export"))
        self.to_child(Export(self._manifest.job, generation, step, stage, path))

    def _from_child(self, message: Message | EngineMessage, payload: bytes) -> None:
        match message:
            case Frame():
                self._daemon.send_frame(message, payload)
            case Ready():
                try:
                    self._keeper.keep_ready(message)
                    self._keeper.said(message)
                except DataError as error:
                    self._post(Failed(self._manifest.job, message.generation, str(error)[:300]))
                else:
                    self._daemon.swarm.invariants.said(self._daemon.name, message)
                    self._report_links()
                    self._post(message)
            case Failed():
                if self._is_configuring:  # what it holds now, nobody knows
                    self._keeper.memory.clear()
                self._post(message)
            case Applied() | Evaluated():
                self._post(message)
            case Configured(generation=generation, step=step):
                if self.plan is not None and generation == self.plan.generation:
                    self._is_configuring = False
                    self._keeper.took(self._taking, step)
                    self._post(Placed(self._manifest.job, generation, step))
            case Exported():
                self._exported(message)

    def _report_links(self) -> None:
        """Where links swing: what they can by now, beside a second of computing."""
        if self.plan is None or not self._daemon.swarm.section(self._manifest.job).swinging_links:
            return
        now_s, me = self._daemon.world.now_s, self._me
        others = [peer for peer in self.plan.workers() if peer != me]
        links = tuple(LinkReport(peer, 0.01, swinging_rate(me, peer, now_s)) for peer in others)
        self._post(Traffic(self._manifest.job, {}, 1.0, links))

    def _exported(self, exported: Exported) -> None:
        """A state file is complete: publish it if that was asked, and tidy up."""
        stage, step = exported.stage, exported.step
        if not exported.path:
            return
        if self._wanted.pop((stage, step), None) is not None:
            self._publish(exported.generation, step, stage)
        if self.plan is not None and not self._is_assigning:
            self._keeper.tidy(self.plan, self._me)

    def _publish(self, generation: Generation, step: int, stage: int) -> None:
        path = self._keeper.file(stage, step)
        if path is None:
            self._post(Failed(self._manifest.job, generation, "cannot publish"))
            return
        ref = self._keeper.publish(path, step)
        self._post(Saved(self._manifest.job, generation, step, stage, ref))

    def on_broken(self, peer: str) -> None:
        """A tensor stream to `peer` broke."""
        if self.plan is not None:
            generation = self.plan.generation
            self._post(LinkBroken(self._manifest.job, generation, PeerId(peer), "broke"))
