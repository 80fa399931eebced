"""One job on this node: obeys whom it is promised to, owns the worker child, relays its messages.

The host outlives its coordinator's stream: the child keeps its state, and whoever may begin the
next generation takes over both.
"""

import asyncio
import contextlib
from dataclasses import replace

from swarmnode.domain import JobId, PeerId, Plan
from swarmnode.errors import PeerLostError, ProtocolError
from swarmnode.handovers import HandOver, Leaving
from swarmnode.manifest import Manifest
from swarmnode.messages import (
    Adopt,
    Adopted,
    Answer,
    Assign,
    Begin,
    Commit,
    Entry,
    Inquire,
    Message,
    Prepare,
    Release,
    Save,
)
from swarmnode.p2p.ports import Stream
from swarmnode.p2p.session import Conversation
from swarmnode.papers import Papers
from swarmnode.threads import in_thread
from swarmnode.worker.answers import answer, refusal
from swarmnode.worker.child_host import ChildHost
from swarmnode.worker.state_keeper import StateKeeper, load_tenancy, save_tenancy
from swarmnode.worker.tenancy import HEIR_PATIENCE_S, ORPHAN_S, Tenancy
from swarmnode.worker.tools import HostTools


class JobHost:
    """One job's stages on this node, from the first promise to the release."""

    def __init__(
        self, manifest: Manifest, canonical: bytes, signature: bytes, tools: HostTools
    ) -> None:
        self.manifest = manifest
        self.tenancy = Tenancy.fresh(manifest.job, manifest.submitter)
        self.num_asking = 0
        self._canonical = canonical
        self._signature = signature
        self._tools = tools
        self._directory = tools.directory / manifest.job
        self.keeper = StateKeeper(
            self._directory, tools.store, starts_itself=manifest.model.weights is None
        )
        self._readers: frozenset[PeerId] = frozenset()
        """Who may fetch states for a plan to come."""
        self._prepared_plan: Plan | None = None
        """One that is not adopted yet, for which states were fetched."""
        self._lock = asyncio.Lock()
        self._is_loaded = False
        self._is_saved = True
        self.has_unsaved_release = False
        """Whether the disk does not know yet that we were let go: only this object does."""
        self._group: asyncio.TaskGroup | None = None
        self._began = asyncio.Event()
        self._ended = asyncio.Event()
        self._stopped = asyncio.Event()
        self._stopped.set()
        self._release: Release | None = None
        self._talk: asyncio.Task[None] | None = None
        self._conversation: Conversation | None = None
        self._coordinator: PeerId | None = None
        """Who is at the other end of the conversation."""
        self.alone = asyncio.Event()
        """Set while no coordinator talks to us, and none is about to."""
        self.alone.set()
        self.has_heir = False
        """Whether the coordinator has left, and named who goes on, and nobody has come since."""
        self._leaves = False
        self._given_up: list[asyncio.TimerHandle] = []
        """When nobody is awaited any more."""
        self._work = ChildHost(manifest, canonical, tools, self.keeper, self.post)

    @property
    def job(self) -> JobId:
        return self.manifest.job

    @property
    def plan(self) -> Plan | None:
        """The plan that is carried out now; None where nothing was assigned in this life."""
        return self._work.plan

    @property
    def child_pid(self) -> int | None:
        return self._work.pid

    @property
    def papers(self) -> Papers | None:
        """What we have in hand of the job; None before a plan was adopted."""
        plan, lease = self.tenancy.plan, self.tenancy.lease
        if plan is None or self.tenancy.is_released:
            return None
        return Papers(self.manifest, self._canonical, self._signature, plan, lease)

    def names(self, peer: PeerId) -> bool:
        """Whether `peer` has business with this job, or will have."""
        return self.tenancy.names(peer) or peer in self._readers

    @property
    def is_running(self) -> bool:
        """From `begin` until the end of `run`."""
        return not self._stopped.is_set()

    # ---- promises --------------------------------------------------------------------------

    async def consider(self, message: Inquire | Assign, sender: PeerId) -> Answer | None:
        """Promise or adopt what is asked for, durably, if that may be.

        None for an assignment that is to be carried out, else what to answer.
        Raises: ProtocolError if the sender has no right to assign, SwarmError if nothing can be
        promised because the disk fails.
        """
        self.num_asking += 1
        try:
            await self.settled()
            async with self._lock:
                await self._load()
                if not self.tenancy.may_ask(message, sender, self._tools.verify_lease):
                    if isinstance(message, Inquire):
                        return refusal(self.tenancy, message, in_touch=self._is_in_touch)
                    raise ProtocolError(f"{sender} does not coordinate job {self.job}")
                before = self.tenancy
                if isinstance(message, Inquire):
                    num_lines = await self._tools.num_lines(self.job)
                    is_live = self._coordinator == before.coordinator
                    is_live = is_live and not before.is_deposed_by(message, sender)
                    after = before.on_inquire(message, sender, is_live, num_lines)
                else:
                    after = before.on_assign(message, sender)
                if after is not None:
                    await self._promise(before, after)
                if isinstance(message, Assign) and after is not None:
                    return None
                return self._answer(message, sender, is_granted=after is not None)
        finally:
            self.num_asking -= 1

    async def _load(self) -> None:
        if self._is_loaded:
            return
        found = await in_thread(load_tenancy, self._directory)
        if found is not None:
            self.tenancy, _, _ = found
            await in_thread(self.keeper.load)
        self._is_loaded = True

    async def _promise(self, before: Tenancy, after: Tenancy) -> None:
        await in_thread(self.keeper.unsettle)
        self.tenancy = after  # from here on nothing lower is served
        self._tools.switch.fence(self.job, after.promised)
        if after.plan is not None and after.plan is not before.plan:
            await in_thread(self.keeper.change_layers, before.plan, after.plan)
        if after != before or not self._is_saved:
            await self._save()

    async def _save(self) -> None:
        self._is_saved = False  # a full disk now must not make the next question's yes empty
        await in_thread(
            save_tenancy, self._directory, self.tenancy, self._canonical, self._signature
        )
        self._is_saved, self.has_unsaved_release = True, False

    @property
    def _is_in_touch(self) -> bool:
        """Whether the one to whom the job is promised talks to us still, or has let us go."""
        return self.tenancy.is_released or self._coordinator == self.tenancy.promised_to

    def _answer(self, message: Inquire | Assign, sender: PeerId, *, is_granted: bool) -> Answer:
        vote = b""
        if isinstance(message, Inquire) and is_granted:
            vote = self._tools.vote(message, sender)
        return answer(
            message, self.tenancy, self.keeper, self._prepared_plan, is_granted=is_granted,
            is_warm=self._work.is_warm, in_touch=self._is_in_touch, vote=vote,
        )  # fmt: skip

    # ---- life ------------------------------------------------------------------------------

    async def settled(self) -> None:
        """Wait while the host is on its way to an end: then it can begin again."""
        while self.is_running and self._ended.is_set():
            await self._stopped.wait()

    def begin(self) -> None:
        """Say that `run` follows."""
        assert not self.is_running
        self._stopped.clear()
        self._ended.clear()

    async def run(self) -> None:
        """Hold the job until it is released, or nobody asks for it for ORPHAN_S."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                self._began.set()
                await self._ended.wait()
                raise _EndedError
        except* _EndedError:
            pass
        finally:
            self._ended.set()
            self._group = None
            self._began.clear()
            self._stop_waiting()
            if self._talk is not None:
                self._talk.cancel()
            try:
                await self._work.stop()
                if self._release is not None:
                    release, self._release = self._release, None
                    await self._let_go(release)
            finally:
                self._stopped.set()

    async def _let_go(self, release: Release) -> None:
        """Delete everything of the job but what was promised, which may need the room.

        Raises: SwarmError if that cannot be written even then; `save_release` tries again.
        """
        async with self._lock:
            self.tenancy = replace(self.tenancy, is_released=True, is_over=release.is_over)
            self.has_unsaved_release = True
            await in_thread(self.keeper.unsettle)
            await in_thread(self.keeper.remove)
            await self._save()

    async def save_release(self) -> None:
        """Write what the last release left unwritten. Raises: SwarmError if the disk fails."""
        async with self._lock:
            if self.has_unsaved_release:
                await self._save()

    async def serve(self, stream: Stream, first: Inquire | Assign, answer: Answer | None) -> None:
        """Talk with the coordinator at the other end, in place of the one before.

        `first` has been considered, and `answer` is the answer.
        Raises: PeerLostError, ProtocolError when the conversation ends that way.
        """
        await self._began.wait()
        while (earlier := self._talk) is not None:
            self._talk = self._conversation = self._coordinator = None
            earlier.cancel()
            await asyncio.wait([earlier])
        if not self.tenancy.obeys(stream.peer):
            self.alone.set()
            return
        peer = stream.peer

        async def take(message: Message, _payload: memoryview) -> None:
            await self._on_message(message, peer)

        conversation = Conversation(stream, self.job, take, self._on_control)
        self._talk, self._conversation = asyncio.current_task(), conversation
        self._coordinator = peer
        self._stop_waiting()
        self._tools.on_followed(self.job)
        self.has_heir = False
        self.alone.clear()
        try:
            if self._leaves:  # before the answer: whoever takes over plans without us at once
                self.leave()
            if answer is not None:
                conversation.post(answer)
            elif isinstance(first, Assign):
                self._start_assigning(first)
            with contextlib.suppress(_EndedError):
                await conversation.run()
        finally:
            if self._conversation is conversation:
                self._talk = self._conversation = self._coordinator = None
                self._wait_for_another()

    def _wait_for_another(self) -> None:
        """The coordinator is gone: keep everything for a while."""
        later = asyncio.get_running_loop().call_later
        if self.has_heir:
            self._given_up.append(later(HEIR_PATIENCE_S, self.alone.set))
        else:
            self.alone.set()
        if self.tenancy.plan is None:  # nothing but a promise, and that is on the disk
            self._tools.on_orphaned(self.job)
            self.end()
        if not self.is_running or self._ended.is_set():
            return
        self._given_up.append(later(ORPHAN_S, self.end))
        self._tools.on_orphaned(self.job)

    def _stop_waiting(self) -> None:
        while self._given_up:
            self._given_up.pop().cancel()

    def end(self) -> None:
        """Give the job up now; its files stay."""
        self._ended.set()

    def leave(self) -> None:
        """Tell the coordinator, and whoever follows it, that this node wants to end soon."""
        self._leaves = True
        self.post(Leaving(self.job, self.tenancy.promised, self._tools.incarnation))

    # ---- from the coordinator --------------------------------------------------------------

    async def _on_message(self, message: Message, sender: PeerId) -> None:
        if isinstance(message, Inquire | Assign):
            if isinstance(message, Assign) and not self._is_sound(message, sender):
                raise ProtocolError("an assignment by somebody else, or of half a plan")
            answer = await self.consider(message, sender)
            if answer is not None:
                self.post(answer)
            elif isinstance(message, Assign):
                self._start_assigning(message)
            return
        generation = getattr(message, "generation", self.tenancy.promised)
        if not self.tenancy.obeys(sender) or not self.tenancy.accepts(generation):
            return  # fenced
        match message:
            case Adopt():
                await self._adopt(message, sender)
            case Prepare():
                if self._group is not None and message.plan.is_whole:
                    self._prepared_plan = message.plan
                    self._work.prepare(message, self._group)
            case Begin():
                self.keeper.begun()
                await self._work.send(message)
            case Commit():
                await self._work.commit(message)
            case Save(generation=fence, step=step, stage=stage, readers=readers):
                self._readers |= set(readers)
                if readers:
                    self.keeper.reserve(stage, step)
                if self._group is not None:
                    await self._work.save(fence, step, stage, self._group)
            case Entry(number=number, lines=lines):
                with contextlib.suppress(OSError):  # who lacks lines does not stand in the way
                    await self._tools.on_entry(self.job, number, lines)
            case HandOver(heir=heir):
                if heir == self._tools.me and self.tenancy.plan is not None:
                    self._tools.on_named(self.job)
                self.has_heir = True
                raise _EndedError
            case Release():
                self._release = message
                self._ended.set()
                raise _EndedError
            case _:
                raise ProtocolError(f"a coordinator does not send {type(message).__name__}")

    async def _adopt(self, message: Adopt, sender: PeerId) -> None:
        """Remember a plan in which we have no part; the answer counts as our vote for it."""
        assign = Assign(self.job, message.plan, 0, (), b"", (), message.lease)
        async with self._lock:
            before = self.tenancy
            after = before.on_assign(assign, sender) if message.plan.is_whole else None
            if after is None:
                return
            await self._promise(before, after)
        self._tools.on_adopted(self.job, message.plan)
        self.post(Adopted(self.job, message.plan.generation))

    def _is_sound(self, assign: Assign, sender: PeerId) -> bool:
        plan = assign.plan
        return plan.coordinator == sender and plan.is_whole and bool(plan.held_by(self._tools.me))

    def _start_assigning(self, assign: Assign) -> None:
        assert self._group is not None
        self._readers = frozenset()
        self._tools.on_adopted(self.job, assign.plan)
        self._work.carry_out(assign, self._group)

    # ---- to the coordinator ----------------------------------------------------------------

    def post(self, message: Message) -> None:
        """Tell whoever coordinates; nobody hears it where nobody does."""
        if self._conversation is not None:
            try:
                self._conversation.post(message)
            except PeerLostError:  # it does not listen: another may take over
                assert self._talk is not None
                self._talk.cancel()

    def _on_control(self, num_bytes: int) -> None:
        self._work.reports.control_bytes += num_bytes
        self._tools.on_sent("control", num_bytes)


class _EndedError(Exception):
    """This coordinator has said its last word."""
