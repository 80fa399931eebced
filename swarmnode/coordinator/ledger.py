"""The state of one job, as its coordinator keeps it: a pure machine, events in, effects out.

A step is a transaction. Nothing durable changes on any worker before every slot has said READY
and the commit is in the journal; whatever is lost before that is computed again by the next
generation from the same weights. `Recovery` (recovery.py) decides where state comes from.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from swarmnode.coordinator import events as on
from swarmnode.coordinator import patience
from swarmnode.coordinator.events import Effect, Event, Hangup, Improve, Send, StoreState, Write
from swarmnode.coordinator.outlook import Outlook
from swarmnode.coordinator.pool import Pool
from swarmnode.coordinator.progress import Progress
from swarmnode.coordinator.publications import Publications
from swarmnode.coordinator.recovery import Gather, Holdings
from swarmnode.coordinator.replanning import Replanning
from swarmnode.coordinator.solver.fill import solve
from swarmnode.coordinator.votes import (
    DisagreementError,
    DivergedError,
    StateHashes,
    Votes,
    mean_loss,
)
from swarmnode.domain import Advert, BlobRef, Generation, ModelFacts, PeerId, Plan, SlotId
from swarmnode.errors import CapacityError
from swarmnode.manifest import Manifest
from swarmnode.messages import (
    Applied,
    Assign,
    Begin,
    Commit,
    Evaluated,
    Failed,
    LinkBroken,
    Placed,
    Ready,
    Release,
    Save,
    Saved,
    StateSource,
    Traffic,
)


class Ledger:
    """One job: its placement, its step, who is ready, what is committed."""

    def __init__(
        self, manifest: Manifest, facts: ModelFacts, me: PeerId, signature: bytes, now_s: float
    ) -> None:
        self.manifest = manifest
        self.facts = facts
        self.me = me
        self.job = manifest.job
        self.phase = "waiting"
        self.reason = ""
        self._cause = ""
        self.plan: Plan | None = None
        self.generation = Generation(0)
        self.step = 0
        self.checkpoint: on.CheckpointRecord | None = None
        self.progress = Progress(manifest, now_s)
        self.outlook = Outlook(facts, manifest, me)
        self.replanning = Replanning(now_s)
        self._signature = signature
        self._pool = Pool()
        self._holdings = Holdings(manifest.placement.stages)
        self._gather: Gather | None = None
        self._placed: set[PeerId] = set()
        self._votes = Votes()
        self._evaluated: dict[SlotId, Evaluated] = {}
        self._hashes = StateHashes()
        self._publications = Publications()
        self._failures = 0
        self._broken_links = patience.BrokenLinks()
        self._moved_s = now_s
        self._evaluation_due = False

    @property
    def is_over(self) -> bool:
        return self.phase in ("stopped", "failed")

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """Take one event; the effects must be performed in order."""
        if self.is_over:
            return []
        match event:
            case on.PeersSeen(peers, links):
                self.outlook.measured.linked(self.me, links)
                return self._on_peers(peers, now_s)
            case on.WorkerLost(peer, reason):
                return self._on_lost(peer, reason, now_s)
            case on.Heard(peer, message):
                if getattr(message, "generation", self.generation) != self.generation:
                    return []
                return self._on_message(peer, message, now_s)
            case on.StateStored(stage, step, index):
                return self._on_stored(stage, step, index, now_s)
            case on.StateLost(step=step):
                self._publications.give_up(step)
                is_last = self.phase == "saving" and step == self.step
                return self._failed_once(now_s) if is_last else []
            case on.Improved(asked, found):
                self.replanning.answered(self.generation, asked, found, now_s)
                return self._on_improved(now_s)
            case on.Tick():
                return self._on_tick(now_s)
            case on.StopAsked(reason):
                return self._end("stopped", reason)

    # ---- who is here -----------------------------------------------------------------------

    def _on_peers(self, peers: Sequence[Advert], now_s: float) -> list[Effect]:
        self._pool.see(peers, now_s)
        if self.phase == "waiting":
            return self._place(now_s)
        self.replanning.see(self._pool.usable(now_s))
        return []

    def _on_lost(self, peer: PeerId, reason: str, now_s: float) -> list[Effect]:
        self._pool.bar(peer, now_s)
        self._holdings.forget(peer)
        self.outlook.measured.forget(peer)
        if self.plan is None or peer not in self.plan.workers():
            return []
        self.progress.lost(peer, now_s)
        self.reason = f"lost {peer}: {reason}"
        return [Hangup(peer), *self._place(now_s)]

    def _on_tick(self, now_s: float) -> list[Effect]:
        self._publications.expire(now_s)
        if self._broken_links.are_due(now_s):
            return self._on_broken_link(now_s)
        patience_s = patience.seconds(self.phase, is_gathering=self._gather is not None)
        if now_s - self._moved_s > patience_s:
            self.reason = f"no progress for {now_s - self._moved_s:.0f} s; begun again"
            return self._failed_once(now_s)
        return self._look_for_better(now_s)

    def _look_for_better(self, now_s: float) -> list[Effect]:
        """While the job runs: what a step should take by now, and whether it could be less."""
        if self.plan is None or self.phase not in ("training", "serving"):
            return []
        peers = self._pool.usable(now_s)
        self.outlook.predict(self.plan, peers, now_s)
        serves = self.phase == "serving"
        if not self.replanning.wants_answer(now_s, serves=serves):
            return []
        calm_s = self.replanning.churn.calm_s(now_s)
        return [Improve(self.outlook.request(self.plan, peers, serves=serves, calm_s=calm_s))]

    def _on_improved(self, now_s: float) -> list[Effect]:
        """Conversations have no step boundary: what is worth a move moves now."""
        return self._place(now_s) if self.replanning.chosen and self.phase == "serving" else []

    def _on_broken_link(self, now_s: float) -> list[Effect]:
        """Both ends live, but not for each other: begin again, the second time without one."""
        self.reason = "a link between workers broke; begun again"
        worst = self._broken_links.worst(self.me)
        if worst is not None:
            self._pool.bar(worst, now_s)
            self.reason = f"{worst} does not reach other workers; it gets no work for a while"
        return self._place(now_s)

    # ---- a new generation ------------------------------------------------------------------

    def _place(self, now_s: float) -> list[Effect]:
        """At once: the better placement that waits if there is one, else what is left, repaired."""
        peers = self._pool.usable(now_s)
        chosen = self.replanning.take(peers)
        self._broken_links.begun_again()
        self._gather = None
        self._moved_s = now_s
        try:
            decision = chosen or solve(peers, self.facts, self.manifest, previous=self.plan)
        except CapacityError as error:
            if self.phase != "waiting":
                self._cause = self.reason
            before = f" (before that: {self._cause})" if self._cause else ""
            self.phase, self.reason = "waiting", f"{error}{before}"
            return []
        self.phase = "placing"
        gather = Gather.of(decision, self._holdings)
        if gather is None:  # no live copy of some stage: back to the newest complete state
            self._holdings.clear()
            self._evaluation_due = False
            self.step = self.checkpoint.step if self.checkpoint else 0
            self.progress.rewind(self.step)
            gather = Gather.restored(decision, self.checkpoint, self.manifest, self.me)
        self._gather = gather
        return self._ask_for(gather.awaited) + self._assign(now_s)

    def _ask_for(self, holders: Mapping[int, PeerId]) -> list[Effect]:
        """Ask the holder of each stage to publish its state."""
        saves = {s: Save(self.job, self.generation, self.step, s) for s in holders}
        return [Send(peer, saves[stage]) for stage, peer in holders.items()]

    def _assign(self, now_s: float) -> list[Effect]:
        """Once every state that must move is published: begin the generation."""
        gather = self._gather
        if gather is None or gather.awaited:
            return []
        self._gather = None
        decision = gather.decision
        old = set(self.plan.workers()) if self.plan else set()
        self.generation = Generation(self.generation + 1)
        workers = sorted({peer for row in decision.slots for peer in row})
        addresses = self._pool.addresses([*workers, self.me])
        self.plan = decision.plan(self.generation, self.me, addresses)
        self._placed.clear()
        self._hashes.clear()
        self.outlook.measured.disturbed()
        self.replanning.placed(now_s)
        self._moved_s = now_s
        self._publications.give_up_unanswered()
        effects: list[Effect] = [Write(on.StartedRecord(self.generation, self.step))]
        for peer in workers:
            stages = sorted({at.stage for at in self.plan.hosted_by(peer)})
            sources = tuple((s, gather.source(s, peer, self._holdings)) for s in stages)
            assign = Assign(self.job, self.plan, self.step, sources, self._signature)
            effects.append(Send(peer, assign))
        self._holdings.keep_only(self.plan)
        return effects + [Hangup(peer) for peer in sorted(old - set(workers))]

    def _failed_once(self, now_s: float) -> list[Effect]:
        self._failures += 1
        if self._failures > patience.MAX_FAILURES:
            return self._end("failed", self.reason)
        return self._place(now_s)

    # ---- messages of workers ---------------------------------------------------------------

    def _on_message(self, peer: PeerId, message: object, now_s: float) -> list[Effect]:
        plan = self.plan
        if plan is None or peer not in plan.workers():
            return []
        match message:
            case Placed(step=step) if self.phase == "placing" and step == self.step:
                if self._gather is not None:
                    return []  # of a generation that is being replaced
                self._placed.add(peer)
                self._holdings.add(peer, plan)
                self._moved_s = now_s
                if self._placed == set(plan.workers()):
                    self.reason = ""
                    return self._next(now_s)
            case Ready(step=step, source=source) if self.phase == "training":
                if step == self.step and source in plan and plan.host(source) == peer:
                    self._votes.add(message)
                    self._moved_s = now_s
                    if self._votes.is_complete(plan):
                        return self._commit(now_s)
            case Applied():
                return self._on_applied(peer, message, now_s)
            case Evaluated(step=step, source=source) if self.phase == "evaluating":
                is_last = source.stage == plan.num_stages - 1
                if is_last and step == self.step and source in plan and plan.host(source) == peer:
                    self._evaluated[source] = message
                    self._moved_s = now_s
                    if len(self._evaluated) == plan.num_slots:
                        return self._finish_evaluation(now_s)
            case Saved():
                return self._on_saved(peer, message, now_s)
            case Traffic():
                self._moved_s = now_s if message.compute_s > 0 else self._moved_s
                self.progress.traffic(peer, message)
                self.outlook.measured.busy(peer, message.compute_s)
                self.outlook.measured.linked(peer, message.links)
            case Failed(reason=reason):
                return self._on_failed(peer, reason, now_s)
            case LinkBroken(peer=other):
                self._broken_links.add(peer, other, now_s)
        return []

    def _on_failed(self, peer: PeerId, reason: str, now_s: float) -> list[Effect]:
        """A worker cannot do its part: go on without it, unless nobody can."""
        self._holdings.forget(peer)
        self._pool.bar(peer, now_s)
        self.reason = f"{peer}: {reason}"
        if self._pool.is_hopeless(patience.MAX_STRIKES):
            return self._end("failed", self.reason)
        return [Hangup(peer), *self._place(now_s)]

    def _next(self, now_s: float) -> list[Effect]:
        """What comes after a commit, an evaluation or a placement."""
        assert self.plan is not None
        self._votes.clear()
        self._evaluated.clear()
        self._moved_s = now_s
        over = self.step >= self.manifest.num_steps
        if self._evaluation_due or (over and self.progress.needs_final_evaluation(self.step)):
            self.phase = "evaluating"
            return self._to_all(Begin(self.job, self.generation, self.step, evaluate=True))
        if over:
            return self._finish_saving(now_s)
        if self.replanning.chosen:
            return self._place(now_s)
        self.phase = "training"
        return self._to_all(Begin(self.job, self.generation, self.step))

    def _to_all(self, message: Begin | Commit) -> list[Effect]:
        assert self.plan is not None
        return [Send(peer, message) for peer in self.plan.workers()]

    def _commit(self, now_s: float) -> list[Effect]:
        assert self.plan is not None
        manifest = self.manifest
        try:
            record = self._votes.commit(self.step, self.plan, manifest)
        except DisagreementError as error:
            return self._on_failed(error.peer, error.reason, now_s)
        except DivergedError as error:
            return self._end("failed", str(error))
        effects: list[Effect] = [Write(record)]
        effects += self._to_all(Commit(self.job, self.generation, self.step, record.scale))
        self.progress.committed(self.step, record.loss, now_s)
        self._failures = 0
        self._broken_links.clear()
        self._pool.forgive(self.plan.workers())
        self.outlook.step_done(self.plan)
        self.reason = ""
        self.step += 1
        run = manifest.run
        due = run.checkpoint_every and self.step % run.checkpoint_every == 0
        if (due and not self._publications) or self.step >= manifest.num_steps:
            effects += self._publish(now_s)
        self._evaluation_due = bool(run.evaluate_every and self.step % run.evaluate_every == 0)
        return effects + self._next(now_s)

    def _on_applied(self, peer: PeerId, applied: Applied, now_s: float) -> list[Effect]:
        other = self._hashes.differs_from(peer, applied)
        if other is None:
            return []
        # Nobody can tell which of the two is right: back to a state that both agreed on.
        self.reason = f"stage {applied.stage}: {peer} and {other} differ after step {applied.step}"
        self._holdings.forget_stage(applied.stage)
        return self._failed_once(now_s)

    def _finish_evaluation(self, now_s: float) -> list[Effect]:
        losses = [x for at in sorted(self._evaluated) for x in self._evaluated[at].losses]
        loss = mean_loss(losses)
        self._evaluation_due = False
        self.outlook.measured.disturbed()
        self.progress.evaluated(self.step, loss)
        return [Write(on.EvaluationRecord(self.step, loss)), *self._next(now_s)]

    # ---- checkpoints -----------------------------------------------------------------------

    def _publish(self, now_s: float) -> list[Effect]:
        """Ask one holder of each stage for its state; training goes on meanwhile."""
        assert self.plan is not None
        holders = {stage: row[0] for stage, row in enumerate(self.plan.slots)}
        self._publications.ask(self.step, holders, now_s)
        return self._ask_for(holders)

    def _on_saved(self, peer: PeerId, saved: Saved, now_s: float) -> list[Effect]:
        gather, stage = self._gather, saved.stage
        if gather and saved.step == self.step and gather.awaited.get(stage) == peer:
            del gather.awaited[stage]
            gather.sources[stage] = StateSource("fetch", saved.index, (peer,))
            return self._assign(now_s)
        if self._publications.published(peer, saved.step, stage, saved.index):
            return [StoreState(stage, saved.step, saved.index, peer)]
        return []

    def _on_stored(self, stage: int, step: int, index: BlobRef, now_s: float) -> list[Effect]:
        checkpoint = self._publications.stored(step, stage, index)
        if checkpoint is None or (self.checkpoint and self.checkpoint.step >= step):
            return []
        self.checkpoint = checkpoint
        effects: list[Effect] = [Write(checkpoint)]
        return effects + (self._finish_saving(now_s) if self.phase == "saving" else [])

    def _finish_saving(self, now_s: float) -> list[Effect]:
        """All steps are done: serve, as soon as the final state is stored."""
        trained = self.manifest.num_steps > 0
        if trained and (self.checkpoint is None or self.checkpoint.step != self.step):
            self.phase = "saving"
            return [] if self.step in self._publications else self._publish(now_s)
        self.phase = "serving"
        self.replanning.serves()
        self._failures = 0
        self._pool.forgive(self.plan.workers() if self.plan else ())
        self.progress.going_again(now_s)
        return []

    def _end(self, phase: Literal["stopped", "failed"], reason: str) -> list[Effect]:
        self.phase, self.reason = phase, reason
        workers = self.plan.workers() if self.plan else ()
        effects: list[Effect] = [Write(on.EndRecord(phase, reason))]
        return effects + [Send(peer, Release(self.job, reason)) for peer in workers]
