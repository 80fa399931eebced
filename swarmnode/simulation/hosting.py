"""The worker side of a simulated daemon for one job: the real tenancy and handoff, driven as in
`worker.hosting`. A promise is on the disk before it is told; the log is there before a Ready."""

import json
import math
from collections import deque
from collections.abc import Generator
from dataclasses import replace
from typing import TYPE_CHECKING

from swarmnode.coordinator.succession import NUM_STANDBYS
from swarmnode.domain import PeerId, Plan
from swarmnode.handovers import HandOver, Leaving, StandingBy
from swarmnode.heartbeats import Checking
from swarmnode.manifest import Manifest
from swarmnode.messages import (
    Adopt,
    Adopted,
    Assign,
    Begin,
    Commit,
    Entry,
    Frame,
    Inquire,
    Message,
    Prepare,
    Release,
    Save,
)
from swarmnode.simulation.child_host import SimChildHost
from swarmnode.simulation.keeping import SimKeeper
from swarmnode.simulation.network import HEARTBEAT_S, End
from swarmnode.simulation.world import Script
from swarmnode.worker.answers import answer, refusal
from swarmnode.worker.state_keeper import TENANCY_NAME
from swarmnode.worker.tenancy import HEIR_PATIENCE_S, ORPHAN_S, Tenancy

if TYPE_CHECKING:
    from swarmnode.simulation.daemon import Daemon

SAVE_AGAIN_S = 10.0
"""As in worker.service."""


class Hosting:
    """What one machine holds, has promised and computes for one job, in one life of its daemon."""

    def __init__(self, daemon: "Daemon", manifest: Manifest) -> None:
        self.manifest = manifest
        self._daemon = daemon
        self._directory = f"jobs/{manifest.job}"
        self.keeper = SimKeeper(daemon.machine.disk, self._directory, daemon.store)
        self.work = SimChildHost(daemon, manifest, self.keeper, self._post)
        self._prepared_plan: Plan | None = None
        self._line: End | None = None
        self._inbox: deque[tuple[End, Message]] = deque()
        self._is_busy = False
        self._num_orphaned = 0
        self._heir_due_s = -math.inf
        """Until when the one is awaited whom a leaving coordinator has named."""
        self._is_saved = True
        self._is_loaded = False
        self.tenancy = self._read_tenancy()

    @property
    def plan(self) -> Plan | None:
        """The plan that is carried out now."""
        return self.work.plan

    def _read_tenancy(self) -> Tenancy:
        manifest, disk = self.manifest, self._daemon.machine.disk
        path = f"{self._directory}/{TENANCY_NAME}"
        if path not in disk:
            return Tenancy.fresh(manifest.job, manifest.submitter)
        return Tenancy.from_json(json.loads(disk.read(path)))

    # ---- the control stream ----------------------------------------------------------------

    def take(self, end: End, message: Message) -> None:
        """A message of a coordinator; they are handled one after the other."""
        self._inbox.append((end, message))
        if not self._is_busy:
            self._is_busy = True
            self._daemon.start(self._run())

    def _run(self) -> Script:
        while self._inbox:
            end, message = self._inbox.popleft()
            match message:
                case Inquire() | Assign():
                    yield from self._on_question(end, message)
                case _ if self._is_served(end, message):
                    yield from self._on_message(end, message)
        self._is_busy = False

    def _on_question(self, end: End, message: Inquire | Assign) -> Script:
        """As `JobHost.consider`, and `serve` for a stream that is new."""
        if not self._is_loaded:
            yield from self._load(end)
        sender, before = PeerId(end.peer), self.tenancy
        if not before.may_ask(message, sender, self._daemon.verify_lease):
            if isinstance(message, Inquire):
                self._refuse(end, message)
            end.close()
            return
        if isinstance(message, Inquire):
            is_live = self._line is not None and self._line.peer == before.coordinator
            is_live &= not message.is_agreed  # leases are taken for genuine
            num_lines = self._daemon.num_lines(self.manifest.job)
            after = before.on_inquire(message, sender, is_live, num_lines)
        else:
            after = before.on_assign(message, sender)
        if after is not None and not (yield from self._promise(before, after)):
            self._break(end)
            return
        if end is not self._line and self.tenancy.obeys(sender):
            self._follow(end)
            if not end.is_open:  # whoever asked has gone while we read or wrote
                self.lost(end)
                return
        if isinstance(message, Assign) and after is not None:
            self.stand_by(message.plan)
            self.work.carry_out(message)
            return
        self._answer(end, message, is_granted=after is not None)
        if end is not self._line:
            end.close()

    def _load(self, end: End) -> Script:
        has_files = bool(self._daemon.machine.disk.paths(self._directory))
        load_s = self._daemon.swarm.scenario.swarm.load_s
        left_s = self._daemon.world.random.choice(load_s) if has_files else 0.0
        while left_s > 0:
            yield min(HEARTBEAT_S, left_s)
            left_s -= HEARTBEAT_S
            asking = [end, *(other for other, _ in self._inbox)] if left_s > 0 else ()
            for each in dict.fromkeys(asking):
                each.send(Checking(self.manifest.job))
        self.keeper.load()
        self._is_loaded = True

    def _promise(self, before: Tenancy, after: Tenancy) -> Generator[float, None, bool]:
        """Nothing lower is served from now on; it counts once it is on the disk."""
        self.tenancy = after
        self.keeper.unsettle()
        if after.plan is not None and after.plan is not before.plan:
            self.keeper.change_layers(before.plan, after.plan)
        if after == before and self._is_saved:
            return True
        return (yield from self._save())

    def _save(self) -> Generator[float, None, bool]:
        self._is_saved = False
        disk = self._daemon.machine.disk
        yield disk.sync_s
        said = json.dumps(self.tenancy.to_json()).encode()
        try:
            disk.replace(f"{self._directory}/{TENANCY_NAME}", said)
        except OSError:
            return False
        self._is_saved = True
        return True

    def _break(self, end: End) -> None:
        """What should be promised cannot be: the conversation ends."""
        end.close()
        self.lost(end)

    def _follow(self, end: End) -> None:
        """This stream is the one that counts now."""
        line, self._line, self._heir_due_s = self._line, end, -math.inf
        self._daemon.succession.followed(self.manifest.job)
        if line is not None:
            line.close()

    def lost(self, end: End) -> None:
        """A control stream broke: the child and its state stay for a while."""
        if self._line is not end:
            return
        self._line = None
        self._daemon.succession.orphaned(self.manifest.job)
        if self.tenancy.plan is None:  # nothing but a promise, and that is on the disk
            self.work.stop()
            return
        self._num_orphaned += 1
        self._daemon.after(ORPHAN_S, self._give_up, self._num_orphaned)

    def _give_up(self, number: int) -> None:
        if self._line is None and number == self._num_orphaned:
            self.work.stop()

    def _answer(self, end: End, message: Inquire | Assign, *, is_granted: bool) -> None:
        found = answer(
            message, self.tenancy, self.keeper, self._prepared_plan, is_granted=is_granted,
            is_warm=self.work.is_warm, in_touch=self._is_in_touch,
        )  # fmt: skip
        self._daemon.swarm.answered(self._daemon.name, found)
        end.send(found)

    def _refuse(self, end: End, inquire: Inquire) -> None:
        """What somebody hears who may not ask."""
        end.send(refusal(self.tenancy, inquire, in_touch=self._is_in_touch))

    @property
    def _is_in_touch(self) -> bool:
        """Whether the one to whom the job is promised talks to us still, or has let us go."""
        peer = None if self._line is None else self._line.peer
        return self.tenancy.is_released or peer == self.tenancy.promised_to

    # ---- from the coordinator --------------------------------------------------------------

    def _is_served(self, end: End, message: Message) -> bool:
        """Whether it comes from whom we obey, and is not fenced off."""
        generation = getattr(message, "generation", self.tenancy.promised)
        is_ours = end is self._line and self.tenancy.obeys(PeerId(end.peer))
        return is_ours and self.tenancy.accepts(generation)

    def _on_message(self, end: End, message: Message) -> Script:
        match message:
            case Adopt():
                yield from self._adopt(end, message)
            case Prepare():
                self._prepared_plan = message.plan
                self.work.prepare(message)
            case Begin():
                self.keeper.begun()
                self.work.to_child(message)
            case Commit():
                self.work.commit(message)
            case Save(generation=fence, step=step, stage=stage, readers=readers):
                if readers:
                    self.keeper.reserve(stage, step)
                self.work.save(fence, step, stage)
            case Entry():
                self._daemon.succession.entry(message)
            case HandOver(heir=heir):
                if heir == self._daemon.name and self.tenancy.plan is not None:
                    self._daemon.succession.named(self.manifest.job)
                self._heir_due_s = self._daemon.world.now_s + HEIR_PATIENCE_S
                self._break(end)
            case Release(is_over=is_over):
                yield from self._release(is_over=is_over)

    def _adopt(self, end: End, message: Adopt) -> Script:
        """Remember a plan in which we have no part; the answer counts as our vote for it."""
        job, plan, before = self.manifest.job, message.plan, self.tenancy
        assign = Assign(job, plan, 0, (), b"", (), message.lease)
        after = before.on_assign(assign, PeerId(end.peer))
        if after is None:
            return
        if not (yield from self._promise(before, after)):
            self._break(end)
            return
        self.stand_by(plan)
        self._post(Adopted(job, plan.generation))

    def stand_by(self, plan: Plan) -> None:
        """Data and tokenizers are not simulated: whoever is to stand by can do so at once."""
        if self._daemon.name in plan.voters[1 : 1 + NUM_STANDBYS]:
            self._post(StandingBy(self.manifest.job, plan.generation))

    def _release(self, *, is_over: bool) -> Script:
        """The job is over for this machine: everything of it goes, but for what was promised."""
        self.work.stop()
        if self._line is not None:
            self._line.close()
            self._line = None
        self.tenancy = replace(self.tenancy, is_released=True, is_over=is_over)
        self.keeper.unsettle()
        self.keeper.remove()
        if not (yield from self._save()):
            self._daemon.start(self._save_release())

    def _save_release(self) -> Script:
        """Write what there was no room for as soon as there is, unless it has been written."""
        while not self._is_saved:
            yield SAVE_AGAIN_S
            if not self._is_saved:
                yield from self._save()

    def on_frame(self, frame: Frame, payload: bytes) -> None:
        if self.tenancy.accepts(frame.generation):
            self.work.to_child(frame, payload)

    # ---- to the coordinator ----------------------------------------------------------------

    def _post(self, message: Message) -> None:
        if self._line is not None:
            self._line.send(message)

    @property
    def is_alone(self) -> bool:
        """Whether no coordinator talks to us, and none is about to."""
        return self._line is None and self._daemon.world.now_s >= self._heir_due_s

    def say_leaving(self) -> None:
        incarnation = self._daemon.swarm.directory.incarnation(self._daemon.name)
        self._post(Leaving(self.manifest.job, self.tenancy.promised, incarnation))
