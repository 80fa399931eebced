"""A swarm of obedient workers in memory, for tests of the ledger: no clock, no network, no torch.

A worker's state is the list of commits that it applied, so equal histories mean equal weights.
"""

import hashlib
from collections import deque
from dataclasses import dataclass, field

from swarmnode.coordinator import events as on
from swarmnode.coordinator.ledger import Ledger
from swarmnode.coordinator.replay import replay
from swarmnode.coordinator.solver.fill import solve
from swarmnode.coordinator.solver.request import Improvement, ImproveRequest
from swarmnode.domain import Advert, BlobRef, DeviceSpec, Limits, ModelFacts, PeerId, Plan, SlotId
from swarmnode.manifest import (
    BatchConfig,
    DataContent,
    Manifest,
    ModelContent,
    PlacementConfig,
    RunConfig,
)
from swarmnode.messages import (
    Applied,
    Assign,
    Begin,
    Commit,
    Evaluated,
    Message,
    Placed,
    Ready,
    Release,
    Save,
    Saved,
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
    """One peer: keeps, per stage, the steps that it applied; answers as the protocol asks."""

    peer: PeerId
    batch: BatchConfig
    stages: dict[int, tuple[int, ...]] = field(default_factory=dict)
    plan: Plan | None = None

    def take(self, message: Message, published: dict[BlobRef, tuple[int, ...]]) -> list[Message]:
        match message:
            case Assign(job=job, plan=plan, step=step, sources=sources):
                before, self.stages, self.plan = self.stages, {}, plan
                for stage, source in sources:
                    if source.how == "keep":
                        self.stages[stage] = before[stage]
                    elif source.how == "fetch":
                        assert source.index is not None
                        self.stages[stage] = published[source.index]
                    else:
                        self.stages[stage] = ()
                    assert len(self.stages[stage]) == step, "state is not at the assigned step"
                return [Placed(job, plan.generation, step)]
            case Begin(job=job, generation=generation, step=step, evaluate=evaluate):
                return [
                    self._answer(job, generation, step, at, evaluate)
                    for at in self._slots(generation)
                    if not evaluate or at.stage == self.plan.num_stages - 1
                ]
            case Commit(job=job, generation=generation, step=step):
                for stage in self.stages:
                    assert len(self.stages[stage]) == step, "a step was lost or applied twice"
                    self.stages[stage] += (step,)
                return [
                    Applied(job, generation, step, stage, digest(stage, history))
                    for stage, history in sorted(self.stages.items())
                ]
            case Save(job=job, generation=generation, step=step, stage=stage):
                ref = BlobRef(digest(stage, self.stages[stage]).ljust(64, "0"), step + 1)
                published[ref] = self.stages[stage]
                return [Saved(job, generation, step, stage, ref)]
            case Release():
                self.stages, self.plan = {}, None
        return []

    def _slots(self, generation: int) -> tuple[SlotId, ...]:
        assert self.plan is not None
        assert self.plan.generation == generation
        return self.plan.hosted_by(self.peer)

    def _answer(
        self, job: str, generation: int, step: int, at: SlotId, evaluate: bool
    ) -> Ready | Evaluated:
        assert self.plan is not None
        is_last = at.stage == self.plan.num_stages - 1
        owned = tuple(range(at.slot, self.batch.num_microbatches, self.plan.num_slots))
        losses = tuple(1.0 + mb for mb in owned) if is_last else ()
        if evaluate:
            return Evaluated(job, generation, step, at, losses)
        return Ready(job, generation, step, at, owned, "ab" * 8, ((at.stage, 4.0),), losses)


def digest(stage: int, history: tuple[int, ...]) -> str:
    return hashlib.sha256(f"{stage}:{history}".encode()).hexdigest()


class Bench:
    """A ledger with its workers; messages are delivered one by one, in order."""

    def __init__(
        self, job: Manifest, names: str, *, records: list[on.Record] | None = None
    ) -> None:
        self.job = job
        self.now_s = 0.0
        self.ledger = Ledger(job, FACTS, PeerId("a"), b"", self.now_s)
        replay(self.ledger, records or [])
        self.adverts = {PeerId(name): advert(name) for name in names}
        self.workers = {peer: Worker(peer, job.batch) for peer in self.adverts}
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
                        for answer in self.workers[peer].take(message, self.published):
                            self.inbox.append(on.Heard(peer, answer))
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
        if not isinstance(event, on.Heard) or event.peer in self.workers:
            self.feed(event)
        return event

    def run(self, until: str = "serving", *, max_events: int = 10_000) -> None:
        """Deliver messages until the ledger is in phase `until`."""
        for _ in range(max_events):
            if self.ledger.phase == until:
                return
            assert self.inbox, f"stuck in {self.ledger.phase}: {self.ledger.reason}"
            self.next()
        raise AssertionError(f"still {self.ledger.phase} after {max_events} events")

    def kill(self, name: str) -> None:
        """The peer is gone, with its state; the ledger hears of it at once."""
        peer = PeerId(name)
        del self.workers[peer]
        self.feed(on.WorkerLost(peer, "killed"))

    def commits(self) -> list[int]:
        """Steps as they were committed, in order, repeats included."""
        return [record.step for record in self.journal if isinstance(record, on.CommitRecord)]
