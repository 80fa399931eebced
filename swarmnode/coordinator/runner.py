"""One job's shell: feeds its ledger with what happens and performs what the ledger asks for."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

from swarmnode.coordinator import events as on
from swarmnode.coordinator.journal import Journal
from swarmnode.coordinator.ledger import Ledger
from swarmnode.coordinator.retention import keep_state
from swarmnode.coordinator.solver.request import Improvement, ImproveRequest
from swarmnode.coordinator.solving import Solver
from swarmnode.coordinator.tenure import Tenure
from swarmnode.domain import Advert, Generation, JobId, PeerId
from swarmnode.errors import PeerError, SwarmError
from swarmnode.messages import (
    Adopt,
    Answer,
    Assign,
    Entry,
    Inquire,
    LinkReport,
    Message,
)
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.blobs import BlobClient
from swarmnode.p2p.ports import Transport
from swarmnode.p2p.session import Conversation
from swarmnode.p2p.switch import Switch
from swarmnode.wire import CONTROL_PROTOCOL, MAX_CONTROL_BYTES

TICK_S = 1.0
HANGUP_S = 2.0
"""A line that is given up stays open so long."""


@dataclass(frozen=True)
class RunnerTools:
    """What every job that a node coordinates shares."""

    transport: Transport
    store: BlobStore
    blobs: BlobClient
    switch: Switch
    peers: Callable[[], tuple[Advert, ...]]
    """Who is here, from the directory."""
    on_sent: Callable[[str, int], None]
    on_changed: Callable[[Ledger], None]
    """Called after every event of a job."""
    log: Callable[..., None]
    solver: Solver
    links: Callable[[], tuple[LinkReport, ...]]
    """What this node measured of its own links."""
    on_checkpoint: Callable[[], object] = lambda: None
    """Called in a thread after a checkpoint is in the journal: older ones may go."""
    on_handed_over: Callable[[JobId], None] = lambda _: None
    """Called when this node leaves a job to another coordinator, or candidate."""


@dataclass
class _Line:
    """The control stream to one worker."""

    outbox: asyncio.Queue[Message]
    task: asyncio.Task[None] | None = None
    num_told: int = 0
    """Lines of the journal that were sent on it."""
    asked: int = 0
    """The last generation that was asked for on it: its other end serves nothing lower."""


class JobRunner:
    """Runs one job until it is stopped or fails; `changed` is set after every event."""

    def __init__(
        self,
        ledger: Ledger,
        journal: Journal,
        tenure: Tenure,
        canonical: bytes,
        tools: RunnerTools,
    ) -> None:
        self.ledger = ledger
        self._canonical = canonical
        self._journal = journal
        self._tenure = tenure
        self._tools = tools
        self._events: asyncio.Queue[on.Event] = asyncio.Queue(4096)
        self._lines: dict[PeerId, _Line] = {}
        self._group: asyncio.TaskGroup | None = None
        self._aside: set[asyncio.Task[None]] = set()
        """What nobody waits for once the job is over."""
        self._num_changes = 0
        self._condition = asyncio.Condition()
        self._handling = asyncio.Lock()
        self._stop: on.StopAsked | None = None

    async def run(self) -> None:
        """Work until the job is over. Never raises for what a peer did."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                self._begin_aside(self._tick(), f"tick {self.ledger.job}")
                while not self.ledger.is_over:
                    event = await self._events.get()
                    phase, reason = self.ledger.phase, self.ledger.reason
                    if isinstance(event, on.Heard) and isinstance(event.message, Answer):
                        self._tenure.heard(event.peer, event.message)
                    async with self._handling:
                        for effect in self.ledger.handle(event, time.monotonic()):
                            await self._perform(effect)
                    is_news = self.ledger.phase != phase or self.ledger.reason not in ("", reason)
                    if is_news or isinstance(event, on.WorkerLost):
                        self._report(event)
                    self._tools.on_changed(self.ledger)
                    await self._notify()
                for task in self._aside:
                    task.cancel()
                await self._say_goodbye()
        finally:
            self._tools.switch.leave(self.ledger.job, head=True)
            self._journal.close()
            await asyncio.shield(self._notify())

    async def changed(self, since: int) -> int:
        """Wait until more than `since` events were handled; how many were. Starts with 0."""
        async with self._condition:
            await self._condition.wait_for(lambda: self._num_changes > since)
            return self._num_changes

    async def settled(self) -> None:
        """Wait until what the ledger shows by now is also in the journal."""
        async with self._handling:
            pass

    async def _notify(self) -> None:
        async with self._condition:
            self._num_changes += 1
            self._condition.notify_all()

    async def give_up(self, reason: str) -> None:
        """The shell cannot go on: the job has failed as far as this life of the node goes."""
        self.ledger.phase, self.ledger.reason = "failed", reason
        self._tools.on_changed(self.ledger)
        await self._notify()

    async def pause(self, reason: str) -> None:
        """What the ledger decided last could not be written: nothing happens until `go_on`."""
        self.ledger.phase, self.ledger.reason = "waiting", reason
        self._tools.on_changed(self.ledger)
        await self._notify()

    def go_on(self, ledger: Ledger, journal: Journal, tenure: Tenure) -> None:
        """Make ready to `run` again, from what the files say; that it was to stop still holds."""
        self.ledger, self._journal, self._tenure = ledger, journal, tenure
        self._events = asyncio.Queue(self._events.maxsize)
        self._lines = {}
        if self._stop is not None:
            self._events.put_nowait(self._stop)

    async def tell(self, event: on.Event) -> None:
        if isinstance(event, on.StopAsked):
            self._stop = event
        await self._events.put(event)

    @property
    def num_lines(self) -> int:
        """Lines of its journal."""
        return self._journal.num_lines

    @property
    def checkpoints(self) -> list[on.CheckpointRecord]:
        """Every checkpoint that the journal names, the oldest first."""
        return list(self._journal.checkpoints)

    def _report(self, event: on.Event) -> None:
        ledger = self.ledger
        lost = {"lost": f"{event.peer}: {event.reason}"} if isinstance(event, on.WorkerLost) else {}
        self._tools.log(
            "job",
            job=ledger.job,
            phase=ledger.phase,
            step=ledger.step,
            generation=ledger.generation,
            cause=type(event).__name__,
            reason=ledger.reason,
            **lost,
        )

    async def _tick(self) -> None:
        while True:
            await self.tell(on.PeersSeen(self._tools.peers(), self._tools.links()))
            await self.tell(on.Tick())
            await asyncio.sleep(TICK_S)

    # ---- effects ---------------------------------------------------------------------------

    async def _perform(self, effect: on.Effect) -> None:
        match effect:
            case on.Write(record):
                await asyncio.to_thread(self._journal.append, record)
                self._tell_voters()
                if isinstance(record, on.CheckpointRecord):
                    await asyncio.to_thread(self._tools.on_checkpoint)
                    await asyncio.to_thread(self._journal.fold_if_long)
            case on.Send(peer, message):
                self._send(peer, await self._signed(message))
            case on.Hangup(peer):
                line = self._lines.pop(peer, None)
                if line is not None and line.task is not None:
                    # What was said last still goes out; whoever is released hangs up itself.
                    asyncio.get_running_loop().call_later(HANGUP_S, line.task.cancel)
            case on.StoreState():
                self._begin_aside(self._store(effect), f"store {effect.stage}")
            case on.Improve(request):
                self._begin_aside(self._improve(request), "improve the placement")

    def _begin_aside(self, work: Coroutine[Any, Any, None], name: str) -> None:
        assert self._group is not None
        task = self._group.create_task(work, name=name)
        self._aside.add(task)
        task.add_done_callback(self._aside.discard)

    async def _improve(self, request: ImproveRequest) -> None:
        """Ask the solver; a job never fails because it could not be improved."""
        found: Improvement | None = None
        try:
            found = await self._tools.solver.improve(request)
        except SwarmError as error:
            self._tools.log("not improved", job=self.ledger.job, reason=str(error)[:300])
        await self.tell(on.Improved(request.plan.generation, found))

    async def _signed(self, message: Message) -> Message:
        """With our right to say it, which is on the disk before anybody sees it."""
        if isinstance(message, Inquire):
            num_lines = self._journal.num_lines
            return replace(message, num_lines=num_lines, lease=self._tenure.shown(message))
        if isinstance(message, Assign | Adopt):
            lease = await asyncio.to_thread(self._tenure.begun, message.plan)
            return replace(message, lease=lease)
        return message

    def _send(self, peer: PeerId, message: Message) -> None:
        if isinstance(message, Assign):
            self._tools.switch.join(self.ledger.job, message.plan)
        line = self._lines.get(peer)
        if line is None and isinstance(message, Inquire | Assign):
            line = self._open(peer)
        if line is not None:
            if isinstance(message, Inquire):
                line.asked = message.generation
            line.outbox.put_nowait(message)
            self._tell_voters()

    def _open(self, peer: PeerId) -> _Line:
        assert self._group is not None
        line = self._lines[peer] = _Line(asyncio.Queue(4096))
        line.task = self._group.create_task(self._talk(peer, line), name=f"control {peer}")
        return line

    def _tell_voters(self) -> None:
        """Whoever may have to take over knows every line of the journal before anything follows
        from it."""
        plan, me = self.ledger.plan, self.ledger.me
        if plan is None or plan.coordinator != me:
            return
        for peer in plan.voters:
            line = self._lines.get(peer)
            if line is None or peer == me or line.num_told == self._journal.num_lines:
                continue
            fence = Generation(max(plan.generation, line.asked))
            for number, lines in self._journal.lines(line.num_told):
                line.outbox.put_nowait(Entry(self.ledger.job, fence, number, lines))
            line.num_told = self._journal.num_lines

    def _addresses(self, peer: PeerId) -> tuple[str, ...]:
        """Where the peer says that it is, else where it was."""
        known = [advert.addresses for advert in self._tools.peers() if advert.peer == peer]
        plan = self.ledger.plan
        return known[0] if known else plan.addresses.get(peer, ()) if plan is not None else ()

    async def _talk(self, peer: PeerId, line: _Line) -> None:
        """Hold the control stream to one worker, from the first question on."""
        job = self.ledger.job

        async def heard(message: Message, _payload: memoryview) -> None:
            await self.tell(on.Heard(peer, message))

        try:
            stream = await self._tools.transport.open(
                peer, self._addresses(peer), CONTROL_PROTOCOL, max_message_bytes=MAX_CONTROL_BYTES
            )
            conversation = Conversation(
                stream, job, heard, lambda n: self._tools.on_sent("control", n)
            )
            async with asyncio.TaskGroup() as group:
                forward = group.create_task(self._forward(line.outbox, conversation))
                await conversation.run()
                forward.cancel()
            reason = "closed its control stream"
        except* PeerError as errors:
            first = errors.exceptions[0]
            reason = getattr(first, "reason", None) or str(first)
        if self._lines.get(peer) is line:  # else we gave it up ourselves
            del self._lines[peer]
            await self.tell(on.WorkerLost(peer, reason))

    async def _forward(self, outbox: asyncio.Queue[Message], conversation: Conversation) -> None:
        while True:
            message = await outbox.get()
            begins = isinstance(message, Inquire | Assign)
            conversation.post(message, self._canonical if begins else b"")

    async def _say_goodbye(self) -> None:
        """Give every worker time to hear that it is released; each then closes its side."""
        lines = [line.task for line in self._lines.values() if line.task is not None]
        if lines:
            await asyncio.wait(lines, timeout=2.0)
        for task in lines:
            task.cancel()

    async def _store(self, effect: on.StoreState) -> None:
        """Fetch a published state; the ledger learns how it went."""
        tools, plan = self._tools, self.ledger.plan
        addresses = plan.addresses.get(effect.provider, ()) if plan else ()
        providers = [(effect.provider, addresses)]
        try:
            await keep_state(self.ledger.job, effect.index, providers, tools.blobs, tools.store)
        except (SwarmError, OSError) as error:
            await self.tell(on.StateLost(effect.stage, effect.step, effect.index, str(error)))
        else:
            await self.tell(on.StateStored(effect.stage, effect.step, effect.index))
