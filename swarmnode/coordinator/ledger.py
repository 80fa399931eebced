"""The state of one job, as its coordinator keeps it: a pure machine, events in, effects out.

A step is a transaction. Nothing durable changes on any worker before every slot has said READY
and the commit is in the journal; whatever is lost before that is computed again by the next
generation from the same weights. How a generation is formed is in forming.py.
"""

import math

from swarmnode.coordinator import events as on
from swarmnode.coordinator import patience
from swarmnode.coordinator.events import Effect, Event, Hangup, Send, Write
from swarmnode.coordinator.generations import Generations
from swarmnode.coordinator.votes import DIVERGED_HINT, DisagreementError, DivergedError
from swarmnode.domain import BlobRef, Generation, ModelFacts, PeerId, SlotId
from swarmnode.handovers import HandOver, Leaving, StandingBy
from swarmnode.heartbeats import Checking
from swarmnode.manifest import Manifest
from swarmnode.messages import (
    Adopted,
    Answer,
    Applied,
    Begin,
    Commit,
    Evaluated,
    Failed,
    LinkBroken,
    Placed,
    Prepared,
    Ready,
    Saved,
    Traffic,
)

STUCK_S = 5.0
"""A coordinator that leaves waits so long for a generation that others may never agree to."""

BLIND_S = 30.0
"""Who waits for peers, and does not see those it talks to, lets another one try after so long."""


class Ledger(Generations):
    """One job: who does what, whose part of the step is ready, what may be committed."""

    def __init__(
        self, manifest: Manifest, facts: ModelFacts, me: PeerId, signature: bytes, now_s: float
    ) -> None:
        super().__init__(manifest, facts, me, signature, now_s)
        self._evaluated: dict[SlotId, Evaluated] = {}
        self._diverged_step: int | None = None
        """The step in which some value was not finite last."""
        self._save_again_s = now_s
        """When a final state that could not be stored is asked for again."""
        self._leaves_since_s = math.inf
        """Since when this node wants to end."""
        self._blind_since_s = math.inf
        """Since when it waits for peers, and sees less of them than talk to it."""

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """Take one event; the effects must be performed in order."""
        if self.is_over:
            return []
        match event:
            case on.PeersSeen(peers, links):
                self.outlook.measured.linked(self.me, links)
                return self._on_peers(peers, now_s)
            case on.WorkerLost(peer, reason):
                self.standing_by.discard(peer)
                return self._on_lost(peer, reason, now_s)
            case on.Heard(peer, Answer() as answer):
                return self._on_answer(peer, answer, now_s)
            case on.Heard(peer, Saved() as saved):
                return self._on_saved(peer, saved, now_s)
            case on.Heard(peer, Adopted(generation=generation)):
                if generation != self.generation or self.phase != "placing" or self._forming:
                    return []
                self._adopted.add(peer)
                return self._begin_if_agreed(now_s)
            case on.Heard(peer, Checking()):
                if self._forming is not None:
                    self._forming.inquiry.checking(peer, now_s)
                return []
            case on.Heard(peer, Leaving(incarnation=incarnation)):
                effects = self._on_leaving(peer, incarnation, now_s)
                return effects + self._go(now_s) if peer == self.me else effects
            case on.Heard(peer, StandingBy()):
                self.standing_by.add(peer)
                return []
            case on.Heard(peer, Prepared() as prepared):
                if self._preparing is not None:
                    self._preparing.heard(peer, prepared)
                return []
            case on.Heard(peer, Failed(reason=reason) as failed) if (
                self._forming is not None and failed.generation == self._proposed
            ):
                return self._on_failed(peer, reason, now_s, child_ended=failed.child_ended)
            case on.Heard(peer, message):
                if getattr(message, "generation", self.generation) != self.generation:
                    return []
                return self._on_message(peer, message, now_s)
            case on.StateStored(stage, step, index):
                return self._on_stored(stage, step, index, now_s)
            case on.StateLost(step=step):
                self._publications.lost(step, now_s)
                self._save_again_s = now_s + patience.ASK_AGAIN_S
                return []
            case on.Improved(asked, found):
                self.replanning.answered(self.generation, asked, found, now_s)
                return self._on_better(now_s)
            case on.Tick():
                if (heir := self._seeing_one(now_s)) is not None:
                    return self._name(heir)
                if self.phase == "saving" and self._forming is None:
                    return self._on_tick(now_s) + self._finish_saving(now_s)
                return self._on_tick(now_s)
            case on.StopAsked(reason):
                return self._end("stopped", reason)

    # ---- messages of workers ---------------------------------------------------------------

    def _on_message(self, peer: PeerId, message: object, now_s: float) -> list[Effect]:
        plan = self.plan
        if plan is None or peer not in plan.workers():
            return []
        if isinstance(message, Applied):
            return self._on_applied(peer, message, now_s)
        if self._forming is not None:
            return []
        match message:
            case Placed(step=step) if self.phase == "placing" and step == self.step:
                self._placed.add(peer)
                self._moved_s = now_s
                return self._begin_if_agreed(now_s)
            case Ready(step=step, source=source) if self.phase == "training":
                if step == self.step and source in plan and plan.host(source) == peer:
                    self._votes.add(message)
                    self._moved_s = now_s
                    if self._votes.is_complete(plan):
                        return self._commit(now_s)
            case Evaluated(step=step, source=source) if self.phase == "evaluating":
                is_last = source.stage == plan.num_stages - 1 and plan.computes(source)
                if is_last and step == self.step and plan.host(source) == peer:
                    self._evaluated[source] = message
                    self._moved_s = now_s
                    if len(self._evaluated) == plan.num_slots:
                        return self._finish_evaluation(now_s)
            case Traffic():
                goes_on = message.compute_s > 0 or message.is_moving
                self._moved_s = now_s if goes_on else self._moved_s
                self.record_traffic(peer, message)
            case Failed(reason=reason, is_diverged=True) if self._diverged_step == self.step:
                # On others, too: no single machine is to blame.
                return self._end("failed", f"step {self.step}: {reason}; {DIVERGED_HINT}")
            case Failed(reason=reason, is_mismatch=True) if not self._failures:
                # Once, nobody is to blame: the next generation begins without history.
                self.reason = f"{peer}: {reason}"
                return self._failed_once(now_s)
            case Failed(reason=reason, child_ended=child_ended, blames=slot):
                if message.is_diverged:
                    self._diverged_step = self.step
                at_fault = plan.host(slot) if slot is not None and slot in plan else peer
                return self._on_failed(at_fault, reason, now_s, child_ended=child_ended)
            case LinkBroken(peer=other):
                self._broken_links.add(peer, other, now_s)
        return []

    def _begin_if_agreed(self, now_s: float) -> list[Effect]:
        begun = self._begin_generation()
        if begun is None:
            return []
        self.reason = ""
        return begun + self._next(now_s)

    def _next(self, now_s: float) -> list[Effect]:
        """What comes after a commit, an evaluation or a placement."""
        self._votes.clear()
        self._evaluated.clear()
        self._moved_s = now_s
        over = self.step >= self.manifest.num_steps
        if self.is_evaluation_due:
            self.phase = "evaluating"
            return self._to_all(Begin(self.job, self.generation, self.step, evaluate=True))
        if over:
            return self._finish_saving(now_s)
        self.phase = "training"
        effects = self._hand_down() or self._see_off(now_s)
        if self._forming is not None or self.phase != "training":
            return effects
        if self._is_time_to_move(now_s):
            return effects + self._form(now_s)
        self.stragglers.begins(now_s)
        return effects + self._to_all(Begin(self.job, self.generation, self.step))

    def _to_all(self, message: Begin | Commit) -> list[Effect]:
        assert self.plan is not None
        return [Send(peer, message) for peer in self.plan.workers()]

    def _commit(self, now_s: float) -> list[Effect]:
        assert self.plan is not None
        try:
            record = self._votes.commit(self.step, self.plan, self.manifest)
        except DisagreementError as error:
            return self._on_failed(error.peer, error.reason, now_s)
        except DivergedError as error:
            return self._end("failed", str(error))
        done = self.step + 1
        may_save = self._publications.is_time(now_s) or done >= self.manifest.num_steps
        saves = may_save and self.is_checkpoint_due(done)
        snapshot = saves or self.is_snapshot_due(done)
        commit = Commit(self.job, self.generation, self.step, record.scale, snapshot)
        effects: list[Effect] = [Write(record), *self._to_all(commit)]
        self._record(record, now_s)
        if saves:
            effects += self._publications.ask(self.job, self.plan, self.step, now_s)
        if self._preparing is not None:
            effects += self._preparing.ask(self.step, now_s)
        return effects + self._next(now_s)

    def _on_applied(self, peer: PeerId, applied: Applied, now_s: float) -> list[Effect]:
        other = self._disputes.applied(peer, applied)
        if other is None or self._forming is not None:
            return []
        self.reason = f"stage {applied.stage}: {peer} and {other} differ after step {applied.step}"
        return self._failed_once(now_s)

    def _finish_evaluation(self, now_s: float) -> list[Effect]:
        record = self.record_evaluation(self._evaluated)
        return [Write(record), *self._next(now_s)]

    # ---- checkpoints -----------------------------------------------------------------------

    def _on_saved(self, peer: PeerId, saved: Saved, now_s: float) -> list[Effect]:
        effects = self._publications.published(peer, saved)
        if self._preparing is not None:
            effects += self._preparing.saved(peer, saved)
        if self._forming is not None:
            self._forming.saved(peer, saved)
            effects += self._assign(now_s)
        return effects

    def _on_stored(self, stage: int, step: int, index: BlobRef, now_s: float) -> list[Effect]:
        checkpoint = self._publications.stored(step, stage, index)
        if checkpoint is None or (self.checkpoint and self.checkpoint.step >= step):
            return []
        self.checkpoint = checkpoint
        self.standing_by.clear()  # until they have that too
        effects: list[Effect] = [Write(checkpoint)]
        return effects + (self._finish_saving(now_s) if self.phase == "saving" else [])

    def _finish_saving(self, now_s: float) -> list[Effect]:
        """All steps are done: serve, as soon as the final state is stored."""
        trained = self.manifest.num_steps > 0
        if trained and (self.checkpoint is None or self.checkpoint.step != self.step):
            self.phase = "saving"
            is_early = now_s < self._save_again_s
            if self.step in self._publications or self.plan is None or is_early:
                return []
            return self._publications.ask(self.job, self.plan, self.step, now_s)
        self.phase = "serving"
        self._give_up_preparing()  # what waits for a step boundary would wait for ever
        self.replanning.serves()
        self._failures = 0
        self.pool.forgive(self.plan.workers() if self.plan else ())
        self.progress.going_again(now_s)
        return self._hand_down() or self._see_off(now_s)

    # ---- a coordinator that leaves ---------------------------------------------------------

    def _go(self, now_s: float) -> list[Effect]:
        """This node wants to end, and says so again and again."""
        self._leaves_since_s = min(self._leaves_since_s, now_s)
        forming = self._forming
        if forming is None:  # while it trains, the next step boundary is the time
            return self._hand_down() if self.phase == "serving" else []
        is_stuck = bool(forming.missing) or not forming.inquiry.has_majority
        is_late = now_s - self._leaves_since_s >= STUCK_S
        return [Hangup(self.me)] if is_stuck and is_late else []

    def _hand_down(self) -> list[Effect]:
        """Where this node leaves and has no slots any more: the first standby goes on at once.

        Nothing where no standby has all that it needs yet: it says so once it has.
        """
        plan = self.plan
        if plan is None or not self.pool.leaves(self.me) or self.is_worker(self.me):
            return []
        able = [
            peer
            for peer in plan.voters
            if peer in self.standing_by - self._gone and not self.pool.leaves(peer)
        ]
        return self._name(able[0]) if able else []

    def _seeing_one(self, now_s: float) -> PeerId | None:
        """Who may see the peers for which this node waits. It does not see even those that it talks
        to: its wall clock is wrong, or its directory gone, and it would wait for ever."""
        is_waiting = self.plan is not None and self.phase == "waiting" and self._forming is None
        voters = self.plan.voters if self.plan is not None and is_waiting else ()
        others = [peer for peer in voters if peer != self.me and peer not in self._gone]
        unseen = [peer for peer in others if not self.pool.is_here(peer)]
        self._blind_since_s = min(self._blind_since_s, now_s) if unseen else math.inf
        return unseen[0] if now_s - self._blind_since_s >= BLIND_S else None

    def _name(self, heir: PeerId) -> list[Effect]:
        """Say to all who goes on, and be done."""
        assert self.plan is not None
        word = HandOver(self.job, Generation(max(self.generation, self._proposed)), heir)
        told = sorted({*self.plan.workers(), *self.plan.voters, *self._leftover})
        self.phase, self.reason = "handed over", f"{heir} is to coordinate it now"
        return [Send(peer, word) for peer in told]
