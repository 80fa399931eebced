"""A swarm of obedient workers in memory, for tests of the ledger: no clock, no network, no torch.

A worker's state is the list of commits that it applied, so equal histories mean equal weights.
"""

import dataclasses
import hashlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from swarmnode.coordinator import events as on
from swarmnode.coordinator.ledger import Ledger
from swarmnode.coordinator.solver.fill import solve
from swarmnode.coordinator.solver.request import Improvement, ImproveRequest
from swarmnode.domain import (
    Advert,
    BlobRef,
    DeviceSpec,
    Generation,
    JobId,
    Limits,
    ModelFacts,
    PeerId,
    Plan,
    SlotId,
)
from swarmnode.heartbeats import Checking
from swarmnode.manifest import (
    BatchConfig,
    DataContent,
    Manifest,
    ModelContent,
    PlacementConfig,
    RunConfig,
)
from swarmnode.messages import (
    Adopt,
    Adopted,
    Answer,
    Applied,
    Assign,
    Begin,
    Commit,
    Evaluated,
    Held,
    Inquire,
    Message,
    Placed,
    Prepare,
    Prepared,
    Ready,
    Release,
    Save,
    Saved,
    StateSource,
)

FACTS = ModelFacts(6, 1000, 500, 500, 16, 300, 128, False)
BLOB = BlobRef("0" * 64, 1)


def advert(name: str, *, flops: float = 1e9, memory: int = 1 << 30, until_s: float = 1e9) -> Advert:
    device = DeviceSpec("cpu", name, {"float32": flops}, 1e9, memory, memory, 1)
    return Advert(
        PeerId(name),
        (f"/ip4/127.0.0.1/tcp/1/p2p/{name}",),
        device,
        Limits(memory, 1),
        "0",
        1,
        until_s,
    )


def manifest(
    *, stages: int = 2, slots: int = 2, steps: int = 5, checkpoint_every: int = 2, peers: int = 1
) -> Manifest:
    return Manifest(
        name="job",
        batch=BatchConfig(rows=1, sequence_length=8, num_microbatches=2 * slots),
        placement=PlacementConfig(stages=stages, slots=slots, min_peers=peers),
        run=RunConfig(steps=steps, checkpoint_every=checkpoint_every),
        model=ModelContent(config={}),
        data=DataContent(train=BLOB, validation=BLOB),
        tokenizer=BLOB,
        submitter=PeerId("a"),
        submitted_at_s=0.0,
    )


@dataclass
class Worker:
    """One peer: keeps, per stage, the steps that it applied; answers as the protocol asks.

    A state is the steps applied so far; a log entry is the update's name, by step.
    """

    peer: PeerId
    job: Manifest
    stages: dict[int, tuple[int, ...]] = field(default_factory=dict)
    logs: dict[int, dict[int, BlobRef]] = field(default_factory=dict)
    plan: Plan | None = None
    promised: int = 0
    promised_to: str = ""
    adopted: int = 0
    is_warm: bool = True
    ready: tuple[Ready, ...] = ()
    in_touch: bool = True
    is_reading: bool = False
    """What is on its disk; it answers no question before that is done."""

    def take(self, sender: PeerId, message: Message, world: "Bench") -> list[Message]:
        generation = getattr(message, "generation", Generation(self.promised))
        match message:
            case Inquire(job=job) if self.is_reading:
                return [Checking(job)]
            case Inquire(job=job, based_on=based_on):
                return [
                    self._answer(job, generation, sender, is_up_to_date=based_on >= self.adopted)
                ]
            case Assign(job=job, plan=plan) if plan.generation < self.promised:
                return [self._answer(job, plan.generation, sender, is_up_to_date=False)]
            case Assign(job=job, plan=plan, step=step, sources=sources):
                self.promised, self.promised_to = plan.generation, sender
                self.adopted = plan.generation
                before, self.stages, self.plan, self.ready = self.stages, {}, plan, ()
                for stage, source in sources:
                    self._reach(stage, source, before, message, world)
                    assert len(self.stages[stage]) == step, "state is not at the assigned step"
                return [Placed(job, plan.generation, step)]
            case Adopt(job=job, plan=plan) if plan.generation == self.promised:
                self.adopted = plan.generation
                return [Adopted(job, plan.generation)]
            case Prepare(job=job, plan=plan, step=step, sources=sources):
                self.plan = self.plan or plan
                for stage, source in sources:
                    assert source.index is not None
                    self.stages.setdefault(stage, world.published[source.index])
                return [Prepared(job, plan.generation, step)]
            case Release():
                self.stages, self.plan, self.logs = {}, None, {}
            case _ if generation < self.promised and not isinstance(message, Save):
                return []
            case Begin(job=job, step=step, evaluate=True):
                assert self.plan is not None
                return [
                    Evaluated(job, generation, step, at, self._losses(at))
                    for at in self.plan.hosted_by(self.peer)
                    if at.stage == self.plan.num_stages - 1
                ]
            case Begin(job=job, step=step):
                assert self.plan is not None
                self.ready = tuple(
                    self._ready(job, generation, step, at) for at in self.plan.held_by(self.peer)
                )
                return list(self.ready)
            case Commit(job=job, step=step):
                self.ready = ()
                for stage in self.stages:
                    assert len(self.stages[stage]) == step, "a step was lost or applied twice"
                    self.stages[stage] += (step,)
                return [
                    Applied(job, generation, step, stage, digest(stage, history))
                    for stage, history in sorted(self.stages.items())
                ]
            case Save(job=job, step=step, stage=stage):
                if len(self.stages.get(stage, ())) != step:
                    return []
                ref = BlobRef(digest(stage, self.stages[stage]).ljust(64, "0"), step + 1)
                world.published[ref] = self.stages[stage]
                return [Saved(job, generation, step, stage, ref)]
        return []

    def _answer(
        self, job: JobId, generation: Generation, sender: PeerId, *, is_up_to_date: bool
    ) -> Answer:
        is_new = generation > self.promised
        is_same = (generation, sender) == (self.promised, self.promised_to)
        granted = is_up_to_date and (is_new or is_same)
        if granted:
            self.promised, self.promised_to = generation, sender
        held = []
        for stage, history in sorted(self.stages.items()):
            assert self.plan is not None
            start, stop = self.plan.layers[stage]
            log = sorted(self.logs.get(stage, {})) or [len(history)]
            log_to = log[-1] + 1 if self.logs.get(stage) else len(history)
            held.append(Held(stage, start, stop, len(history), log[0], log_to))
        return Answer(
            job, generation, granted, Generation(self.promised), PeerId(self.promised_to),
            tuple(held), self.ready, is_warm=self.is_warm, in_touch=self.in_touch,
            adopted=Generation(self.adopted),
        )  # fmt: skip

    def _reach(
        self,
        stage: int,
        source: StateSource,
        before: Mapping[int, tuple[int, ...]],
        assign: Assign,
        world: "Bench",
    ) -> None:
        if source.how == "keep":
            state = before[stage][: assign.step]
        elif source.how == "fetch":
            assert source.index is not None
            state = world.published[source.index]
        else:
            state = ()
        for commit in assign.commits:
            if commit.step >= len(state):
                assert commit.step == len(state), "a committed update is missing"
                givers = [self, *(world.workers[p] for p in source.providers if p in world.workers)]
                update = commit.updates[stage]
                assert any(w.logs.get(stage, {}).get(commit.step) == update for w in givers)
                self.logs.setdefault(stage, {})[commit.step] = update
                state += (commit.step,)
        self.stages[stage] = state

    def _losses(self, at: SlotId) -> tuple[float, ...]:
        assert self.plan is not None
        is_last = at.stage == self.plan.num_stages - 1 and self.plan.computes(at)
        return tuple(1.0 + mb for mb in self._owned(at)) if is_last else ()

    def _owned(self, at: SlotId) -> tuple[int, ...]:
        assert self.plan is not None
        if not self.plan.computes(at):
            return ()
        return tuple(range(at.slot, self.job.microbatches_per_step, self.plan.num_slots))

    def _ready(self, job: JobId, generation: Generation, step: int, at: SlotId) -> Ready:
        update = BlobRef(digest(at.stage, (*self.stages[at.stage], step)), 1)
        self.logs.setdefault(at.stage, {})[step] = update
        squares = ((at.stage, 4.0),)
        return Ready(job, generation, step, at, self._owned(at), update, squares, self._losses(at))


def digest(stage: int, history: tuple[int, ...]) -> str:
    return hashlib.sha256(f"{stage}:{history}".encode()).hexdigest()


class Bench:
    """A ledger with its workers; messages are delivered one by one, in order."""

    def __init__(
        self,
        job: Manifest,
        names: str,
        *,
        records: list[on.Record] | None = None,
        me: str = "a",
        facts: ModelFacts = FACTS,
    ) -> None:
        self.job = job
        self.now_s = 0.0
        self.ledger = Ledger(job, facts, PeerId(me), b"", self.now_s)
        self.ledger.restore(records or [])
        self.adverts = {PeerId(name): advert(name) for name in names}
        self.workers = {peer: Worker(peer, job) for peer in self.adverts}
        self.journal: list[on.Record] = list(records or [])
        self.sent: list[on.Send] = []
        self.published: dict[BlobRef, tuple[int, ...]] = {}
        self.inbox: deque[on.Event] = deque()
        self.move_s = 0.0

    def start(self) -> "Bench":
        self.feed(on.PeersSeen(tuple(self.adverts.values())))
        return self

    def feed(self, event: on.Event) -> None:
        """Handle one event; what workers answer waits in the inbox."""
        self.now_s += 0.01
        for effect in self.ledger.handle(event, self.now_s):
            match effect:
                case on.Write(record):
                    self.journal.append(record)
                case on.Send(peer, message):
                    self.sent.append(effect)
                    if peer in self.workers:
                        for answer in self.workers[peer].take(self.ledger.me, message, self):
                            self.inbox.append(on.Heard(peer, answer))
                    elif isinstance(message, Inquire | Assign):
                        self.inbox.append(on.WorkerLost(peer, "cannot be reached"))
                case on.Improve(request):
                    self.inbox.append(on.Improved(request.plan.generation, self.improve(request)))
                case on.StoreState(stage, step, index):
                    self.inbox.append(on.StateStored(stage, step, index))

    def improve(self, request: ImproveRequest) -> Improvement:
        """A solver that places everything afresh, with the first answer's own prediction."""
        decision = solve(request.swarm.peers, request.facts, request.job)
        return Improvement(decision, request.plan.predicted_step_s, self.move_s)

    def tick(self, after_s: float) -> None:
        """Time passes, and the ledger hears of it."""
        self.now_s += after_s
        self.feed(on.Tick())

    def next(self) -> on.Event:
        event = self.inbox.popleft()
        is_of_the_dead = isinstance(event, on.Heard) and event.peer not in self.workers
        if not is_of_the_dead:
            self.feed(event)
        return event

    def run(self, until: str = "serving", *, max_events: int = 10_000) -> None:
        """Deliver messages until the ledger is in phase `until`."""
        for _ in range(max_events):
            if self.ledger.phase == until:
                return
            if not self.inbox:
                self.tick(1.0)
            else:
                self.next()
        raise AssertionError(f"still {self.ledger.phase}: {self.ledger.reason}")

    def kill(self, name: str) -> None:
        """The peer is gone, with its state; the ledger hears of it at once."""
        peer = PeerId(name)
        del self.workers[peer]
        self.feed(on.WorkerLost(peer, "killed"))

    def revive(self, name: str) -> None:
        """The peer is here again, started anew, with nothing."""
        newcomer = advert(name, until_s=1e9 + self.now_s + 1)
        self.adverts[newcomer.peer] = newcomer
        self.workers[newcomer.peer] = Worker(newcomer.peer, self.job)
        self.start()

    def forget_messages(self) -> None:
        """What is under way is lost, and no worker has finished its part of the step."""
        self.inbox.clear()
        for worker in self.workers.values():
            worker.ready = ()

    def say_ready(self, **changes: object) -> None:
        """The first Ready under way says something else, and so does its worker when asked."""
        while not any(isinstance(e, on.Heard) and isinstance(e.message, Ready) for e in self.inbox):
            self.next()
        first = next(
            e for e in self.inbox if isinstance(e, on.Heard) and isinstance(e.message, Ready)
        )
        assert isinstance(first.message, Ready)
        said = dataclasses.replace(first.message, **changes)
        self.inbox[self.inbox.index(first)] = on.Heard(first.peer, said)
        worker = self.workers[first.peer]
        worker.ready = tuple(said if r == first.message else r for r in worker.ready)

    def commits(self) -> list[int]:
        """Steps as they were committed, in order, repeats included."""
        return [record.step for record in self.journal if isinstance(record, on.CommitRecord)]


def histories(bench: Bench) -> set[tuple[int, ...]]:
    return {history for worker in bench.workers.values() for history in worker.stages.values()}
