"""The worker child of one job: made ready for each generation, fed, listened to, and ended."""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

from swarmnode.children import Child
from swarmnode.domain import Generation, PeerId, Plan
from swarmnode.engine_messages import (
    Alive,
    Busy,
    Coded,
    Configure,
    Configured,
    EngineMessage,
    Export,
    Exported,
    LivenessCheck,
    Warm,
)
from swarmnode.errors import ChildError, ProtocolError, SwarmError
from swarmnode.failpoints import hit
from swarmnode.manifest import Manifest
from swarmnode.messages import (
    Applied,
    Assign,
    Commit,
    Evaluated,
    Failed,
    Frame,
    LinkBroken,
    Message,
    Placed,
    Prepare,
    Prepared,
    Ready,
    Saved,
)
from swarmnode.p2p.switch import TensorMessage
from swarmnode.session_messages import (
    SessionClose,
    SessionFailed,
    SessionFrame,
    SessionToken,
)
from swarmnode.wire import pack, unpack_local
from swarmnode.worker import child_watch as watching
from swarmnode.worker.assigning import gather, plan_handoffs
from swarmnode.worker.child_watch import ChildWatch
from swarmnode.worker.fetching import Fetcher
from swarmnode.worker.files import state_path
from swarmnode.worker.handoff import Handoff
from swarmnode.worker.reports import Reports
from swarmnode.worker.state_keeper import StateKeeper
from swarmnode.worker.tools import HostTools


class ChildHost:
    """Carries out plans with a child of its own; what it has to say goes to `post`."""

    def __init__(
        self,
        manifest: Manifest,
        canonical: bytes,
        tools: HostTools,
        keeper: StateKeeper,
        post: Callable[[Message], None],
    ) -> None:
        self.plan: Plan | None = None
        """The plan that is carried out now."""
        self.reports = Reports(manifest.job, tools, post, lambda: self.plan)
        self._job = manifest.job
        self._manifest = manifest
        self._canonical = canonical
        self._tools = tools
        self._keeper = keeper
        self._post = post
        self._group: asyncio.TaskGroup | None = None
        self._child: Child | None = None
        self._is_warm = asyncio.Event()
        """Set once there is nothing to wait for: the child computes at once, or it has ended."""
        self._watch: ChildWatch | None = None
        self._is_listening = False
        """Whether the child's next word is waited for, and not its last one handed on."""
        self._assigning: asyncio.Task[None] | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._given_up: set[asyncio.Task[None]] = set()
        """What was cancelled and has not ended: it may write a file still."""
        self._handoffs: dict[int, Handoff] = {}
        self._is_configuring = False
        self._wanted: dict[tuple[int, int], Generation] = {}
        """States to publish as soon as the child has written them: (stage, step)."""

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child else None

    @property
    def is_warm(self) -> bool:
        """Whether a child is there that could compute at once."""
        return self._child is not None and self._is_warm.is_set()

    # ---- what it is to do ------------------------------------------------------------------

    def carry_out(self, assign: Assign, group: asyncio.TaskGroup) -> None:
        """Go over to the plan of `assign`; what goes on about an earlier one is given up."""
        self._group = group
        self._give_up(self._assigning)
        self._give_up(self._preparing)
        self.plan = assign.plan
        self._tools.switch.join(
            self._job, assign.plan, to_worker=self._on_tensor, on_broken=self._on_broken
        )
        task = self._assign(assign)
        self._assigning = group.create_task(task, name=f"assign {self._job}")

    def prepare(self, prepare: Prepare, group: asyncio.TaskGroup) -> None:
        """Fetch what a later plan will need, and have a child that is ready to compute."""
        self._group = group
        self._give_up(self._preparing)
        self._preparing = group.create_task(self._prepare(prepare), name=f"prepare {self._job}")

    def _give_up(self, task: asyncio.Task[None] | None) -> None:
        if task is not None and not task.done():
            task.cancel()
            self._given_up.add(task)
            task.add_done_callback(self._given_up.discard)

    async def _until_given_up(self) -> None:
        """Return when nothing that was cancelled writes a file any more."""
        if self._given_up:
            await asyncio.wait(self._given_up)

    async def _prepare(self, prepare: Prepare) -> None:
        await self._until_given_up()
        tools, keeper, plan = self._tools, self._keeper, prepare.plan
        assign = Assign(self._job, plan, prepare.step, prepare.sources, b"")
        try:
            if self._child is None:
                await self._start_child()
            stages = keeper.expect(stage for stage, _ in prepare.sources)
            planned = plan_handoffs(assign, tools.me, self._manifest, keeper, stages)
            fetcher = self._fetcher(plan)
            await gather(assign, self._manifest, planned, keeper, fetcher, tools.me)
            await self._is_warm.wait()  # or all others would wait for it when it gets its slots
            self._post(Prepared(self._job, plan.generation, prepare.step))
        except (SwarmError, OSError) as error:  # not needed yet: it will be fetched again
            failure = str(error)[:300] or type(error).__name__
            self._tools.log("not prepared", job=self._job, reason=failure)
            self._post(Prepared(self._job, plan.generation, prepare.step, failure))

    async def stop(self) -> None:
        """End the child, and with it what only its memory holds."""
        self._tools.switch.leave(self._job, worker=True)
        if self._child is not None:
            child, self._child = self._child, None
            await asyncio.shield(child.stop(grace_s=2.0))
        self._keeper.memory.clear()
        self.plan = self._group = None

    async def _assign(self, assign: Assign) -> None:
        """Fetch what is missing, then make the child ready for the generation."""
        await self._until_given_up()
        tools, keeper, plan = self._tools, self._keeper, assign.plan
        try:
            planned = plan_handoffs(assign, tools.me, self._manifest, keeper)
            fetcher = self._fetcher(plan)
            bases = await gather(assign, self._manifest, planned, keeper, fetcher, tools.me)
            if self._child is None:
                await self._start_child()
            configure = Configure(
                job=self._job,
                peer=tools.me,
                plan=plan,
                step=assign.step,
                bases=bases,
                blob_directory=str(tools.store.root),
                log_directory=str(self._keeper.directory),
                num_threads=1 if self._manifest.run.deterministic else tools.num_threads,
                device=tools.device,
                trace_directory=tools.trace_directory,
            )
            self._handoffs = {stage: taken for stage, (taken, _) in planned.items()}
            keeper.memory = dict.fromkeys(planned, assign.step)  # once it reads the next message
            self._is_configuring = True
            self._tell_watch(watching.Configuring())  # asks behind what is sent now
            await self.send(configure, self._canonical)
        except (SwarmError, OSError) as error:
            self._post(Failed(self._job, plan.generation, f"{error}"[:1000]))

    async def commit(self, commit: Commit) -> None:
        """Let the child apply a step. What follows is done after it, so it counts as applied."""
        hit("commit_received", commit.step)
        memory = self._keeper.memory
        for stage in [stage for stage, step in memory.items() if step == commit.step]:
            memory[stage] = commit.step + 1
        await self.send(commit)

    async def save(
        self, generation: Generation, step: int, stage: int, group: asyncio.TaskGroup
    ) -> None:
        """Publish the state of that step from the disk; if it is not there yet, ask for it."""
        self._group = group
        path = self._keeper.file(stage, step)
        if path is not None:
            exported = Exported(self._job, generation, step, stage, str(path))
            self._group.create_task(self._publish(exported), name=f"publish {path}")
            return
        self._wanted[stage, step] = generation
        path = state_path(self._keeper.directory, stage, step, "export")
        await self.send(Export(self._job, generation, step, stage, str(path)))

    def _fetcher(self, plan: Plan) -> Fetcher:
        tools = self._tools
        return Fetcher(
            self._job, plan, tools.me, tools.store, tools.blobs,
            lambda: self.reports.fetched(_now_s()),
        )  # fmt: skip

    # ---- the child -------------------------------------------------------------------------

    async def _start_child(self) -> None:
        assert self._group is not None
        child = await self._tools.nursery.child(f"worker child of job {self._job}")
        self._is_warm.clear()
        self._child = child
        self._watch = watch = ChildWatch(self._tools.child_hang_s)
        self._group.create_task(self._read_child(child), name=f"child of {self._job}")
        self._group.create_task(self._watch_child(child, watch), name=f"watch of {self._job}")

    async def send(
        self, message: Message | EngineMessage, payload: bytes | memoryview = b""
    ) -> None:
        """Hand a message to the child, if there is one."""
        if self._child is None:
            return
        with contextlib.suppress(ChildError):  # _read_child reports it
            await self._child.send(pack(message), payload)

    async def _on_tensor(
        self, message: TensorMessage, payload: bytes | bytearray | memoryview
    ) -> None:
        if self._child is not None:
            with contextlib.suppress(ChildError):
                await self._child.send(pack(message), payload)

    async def _read_child(self, child: Child) -> None:
        try:
            while True:
                self._is_listening = True
                message, payload = unpack_local(await child.receive())
                self._is_listening = False
                await self._from_child(message, payload)
        except ChildError as error:
            self._child = None
            self._is_warm.set()
            self._keeper.memory.clear()
            generation = self.plan.generation if self.plan else Generation(0)
            self._post(Failed(self._job, generation, str(error)[:1000], child_ended=True))
            await child.stop(grace_s=0.1)

    async def _from_child(self, message: Message | EngineMessage, payload: memoryview) -> None:
        match message:
            case Frame() | SessionFrame() | SessionToken() | SessionFailed() | SessionClose():
                await self._tools.switch.send(message, payload)
            case Ready(generation=generation):
                try:
                    await asyncio.to_thread(self._keeper.keep_ready, message)
                    self._keeper.said(message)
                except SwarmError as error:
                    self._post(Failed(self._job, generation, str(error)[:1000]))
                    return
                self._post(message)
                self.reports.tell(_now_s())
            case Evaluated():
                self._post(message)
                self.reports.tell(_now_s())
            case Applied():
                self._post(message)
            case Failed():
                if self._is_configuring:  # what it holds now, nobody knows
                    self._keeper.memory.clear()
                self._post(message)
            case Configured(generation=generation, step=step):
                await self._placed(generation, step)
            case Exported():
                await self._exported(message)
            case Alive():
                self._tell_watch(watching.Answered())
            case Warm():
                self._is_warm.set()
            case Coded(codings=codings):
                self.reports.coded(codings)
                self._tools.on_coded(codings)
            case Busy(compute_s=compute_s):
                self.reports.computed(compute_s, _now_s())
                self._tools.on_compute(compute_s)
            case _:
                raise ProtocolError(f"the child does not send {type(message).__name__}")

    async def _placed(self, generation: Generation, step: int) -> None:
        if self.plan is not None and generation == self.plan.generation:
            self._is_configuring = False
            await asyncio.to_thread(self._keeper.took, self._handoffs, step)
            self._post(Placed(self._job, generation, step))

    async def _exported(self, exported: Exported) -> None:
        """A file is written: publish it if it was waited for, and delete what it replaces."""
        assert self._group is not None
        if not exported.path:
            return
        generation = self._wanted.pop((exported.stage, exported.step), None)
        if generation is not None:
            name = f"publish {exported.path}"
            self._group.create_task(self._publish(exported), name=name)
        if self.plan is not None and (self._assigning is None or self._assigning.done()):
            await asyncio.to_thread(self._keeper.tidy, self.plan, self._tools.me)

    async def _publish(self, exported: Exported) -> None:
        """Serve a state in chunks."""
        generation, step, stage = exported.generation, exported.step, exported.stage
        try:
            ref = await asyncio.to_thread(self._keeper.publish, Path(exported.path), step)
        except (SwarmError, OSError) as error:
            self._post(Failed(self._job, generation, f"cannot publish: {error}"))
            return
        self._post(Saved(self._job, generation, step, stage, ref))

    # ---- whether it hangs ------------------------------------------------------------------

    async def _watch_child(self, child: Child, watch: ChildWatch) -> None:
        """Look regularly whether the child goes on, until it has ended.

        Each look is a task: a child that hangs may not even take the question.
        """
        assert self._group is not None
        while self._child is child:
            self._group.create_task(self._look_at(child, watch), name=f"look at {self._job}")
            await asyncio.sleep(watch.look_s)

    async def _look_at(self, child: Child, watch: ChildWatch) -> None:
        look, now_s = watching.Look(is_listening=self._is_listening), _now_s()
        self.reports.look(now_s)
        await self._heed(child, watch.handle(look, now_s))

    def _tell_watch(self, event: watching.Configuring | watching.Answered) -> None:
        assert self._group is not None
        if self._child is not None and self._watch is not None:
            effects = self._watch.handle(event, _now_s())
            task = self._heed(self._child, effects)
            self._group.create_task(task, name=f"ask the child of {self._job}")

    async def _heed(self, child: Child, effects: list[watching.Ask | watching.GiveUp]) -> None:
        for effect in effects:
            match effect:
                case watching.Ask():  # nothing is awaited before: the order is the watch's
                    with contextlib.suppress(ChildError):
                        await child.send(pack(LivenessCheck()))
                case watching.GiveUp(silent_s):
                    self._tools.log("child hangs", job=self._job, pid=child.pid, silent_s=silent_s)
                    child.name += f", silent for {silent_s:.0f} s,"
                    child.kill()

    # ---- what it tells ---------------------------------------------------------------------

    def _on_broken(self, peer: PeerId, reason: str) -> None:
        if self.plan is not None:
            self._post(LinkBroken(self._job, self.plan.generation, peer, reason[:1000]))


def _now_s() -> float:
    return asyncio.get_running_loop().time()
