"""From one generation of a job to the next: who is here, who is lost, who does what from now on."""

import math
from collections.abc import Sequence
from dataclasses import replace

from swarmnode.coordinator import events as on
from swarmnode.coordinator import patience
from swarmnode.coordinator.disputes import Disputes
from swarmnode.coordinator.events import Effect, Hangup, Write
from swarmnode.coordinator.forming import SEARCH_S, Forming
from swarmnode.coordinator.inquiry import Inquiry
from swarmnode.coordinator.moves import Moves
from swarmnode.coordinator.publications import Publications
from swarmnode.coordinator.solver.decision import decision_of
from swarmnode.coordinator.solver.fill import solve
from swarmnode.coordinator.votes import Votes
from swarmnode.domain import Advert, Generation, ModelFacts, PeerId
from swarmnode.errors import CapacityError
from swarmnode.manifest import Manifest
from swarmnode.messages import Answer


class Generations(Moves):
    """A job that is placed, and placed again whenever somebody is lost or a better place is found.

    What a generation does is the ledger's affair.
    """

    def __init__(
        self, manifest: Manifest, facts: ModelFacts, me: PeerId, signature: bytes, now_s: float
    ) -> None:
        super().__init__(manifest, facts, me, signature, now_s)
        self._cause = ""
        self._forming: Forming | None = None
        self._proposed = Generation(0)
        self._agreement: Inquiry | None = None
        """The question from which the plan came: its voters must adopt the plan too."""
        self._placed: set[PeerId] = set()
        self._adopted: set[PeerId] = set()
        self._votes = Votes()
        self._disputes = Disputes()
        self._publications = Publications()
        self._failures = 0
        self._broken_links = patience.BrokenLinks()
        self._moved_s = now_s
        self._behind_since_s = math.inf  # others know a later plan, and we cannot win without them
        self._lacking_since_s = math.inf
        """Since when others refuse what they hold and we need."""
        self._num_outbid = 0
        self._gone: set[PeerId] = set()
        """Peers that could not be reached when last we heard of them."""

    # ---- who is here -----------------------------------------------------------------------

    def _on_peers(self, peers: Sequence[Advert], now_s: float) -> list[Effect]:
        self.pool.see(peers, now_s)
        if self.phase == "waiting" and self._forming is None:
            return self._form(now_s)
        self.replanning.see(self.pool.usable(now_s))
        return []

    def _on_lost(self, peer: PeerId, reason: str, now_s: float) -> list[Effect]:
        forming = self._forming
        if forming is not None and forming.inquiry.has_refused(peer):
            forming.inquiry.lost(peer)
            return self._take_stock(now_s)
        is_news = peer not in self._gone
        if is_news:
            self._gone.add(peer)
            self.pool.bar(peer, now_s)
            self.outlook.measured.forget(peer)
            self.link_codecs.forget(peer)
        if is_news and self.is_worker(peer):
            self.progress.lost(peer, now_s)
            self.reason = f"lost {peer}: {reason}"
        if self._preparing is not None and peer in self._preparing.newcomers:
            self._give_up_preparing()
        if forming is not None:
            takes_part = peer in forming.inquiry.granted
            forming.inquiry.lost(peer)
            is_needed = forming.is_gathering and is_news and takes_part
            return self._form(now_s) if is_needed else self._take_stock(now_s)
        if self.is_worker(peer) or (self.phase == "placing" and self._is_awaited(peer)):
            return [Hangup(peer), *self._form(now_s)]
        return []

    def _is_awaited(self, peer: PeerId) -> bool:
        """Whether the plan at hand may need the word of this voter; who refused gives none."""
        asked = self._agreement
        return asked is not None and peer in asked.voters and peer in asked.granted

    def _on_tick(self, now_s: float) -> list[Effect]:
        self._publications.expire(now_s)
        forming = self._forming
        if forming is not None:
            effects = forming.again(self.head, self.pool, now_s)
            is_overdue = forming.is_overdue(now_s, self.redo_s)
            if is_overdue and forming.inquiry.rival(forming.missing) is None:
                return effects + self._go_back(now_s)
            if not forming.is_gathering:
                return effects + self._take_stock(now_s)
        elif self._broken_links.are_due(now_s):
            return self._on_broken_link(now_s)
        is_gathering = forming is not None and forming.is_gathering
        patience_s = patience.seconds(self.phase, is_gathering=is_gathering)
        if now_s - self._moved_s > patience_s:
            self.reason = f"no progress for {now_s - self._moved_s:.0f} s; begun again"
            if self.phase == "placing" and forming is None and self.plan is not None:
                for peer in patience.silent(self.plan.workers(), self._placed):
                    self.pool.bar(peer, now_s)
            return self._failed_once(now_s)
        if self._sends_straggler_away(now_s):
            return self._form(now_s)
        return self._second_holders(now_s) + self.look_for_better(now_s)

    def _on_broken_link(self, now_s: float) -> list[Effect]:
        """Both ends live, but not for each other: begin again, the second time without one."""
        self.reason = "a link between workers broke; begun again"
        worst = self._broken_links.worst(self.me)
        if worst is not None:
            self.pool.bar(worst, now_s)
            self.reason = f"{worst} does not reach other workers; it gets no work for a while"
        return self._form(now_s)

    # ---- a better placement ----------------------------------------------------------------

    def _on_better(self, now_s: float) -> list[Effect]:
        """A better placement was chosen: let newcomers fetch what they need before it is taken."""
        chosen, plan = self.replanning.chosen, self.plan
        if chosen is None or plan is None or self._forming is not None:
            return []
        if self._preparing is not None and self._preparing.decision is chosen:
            return []
        if self.phase == "serving":  # conversations have no step boundary
            return self._form(now_s)
        return self._prepare(chosen, plan, now_s)

    def _on_leaving(self, peer: PeerId, incarnation: int, now_s: float) -> list[Effect]:
        """A peer wants to end. It says so until it is let go, whatever goes on meanwhile."""
        self.pool.leave(peer, incarnation)
        if self._forming is not None:
            return []
        if self._preparing is not None and peer in self._preparing.newcomers:
            self._give_up_preparing()
        effects: list[Effect] = [] if self._is_needed(peer) else self._let_go([peer])
        return effects + self._see_off(now_s)

    def _is_needed(self, peer: PeerId) -> bool:
        """Whether the generation at hand cannot do without this peer."""
        plan = self.plan
        if plan is None or self.phase == "waiting":
            return False
        if not self.is_begun or peer in (*plan.workers(), self.me):
            return True
        stay = {voter for voter in plan.voters if not self.pool.leaves(voter)} - self._gone
        asked = Inquiry(self._proposed, plan, self.me)
        return peer in plan.voters and not asked.is_majority(stay)

    def _see_off(self, now_s: float) -> list[Effect]:
        """Do what must be done before those can go who leave: their successors fetch what they
        need, where there are steps meanwhile. Without slots, others vote from then on."""
        plan = self.plan
        if plan is None or self._forming is not None or self.phase == "waiting":
            return []
        losers = {*filter(self.pool.leaves, plan.workers())}
        leavers = losers | ({*filter(self.pool.leaves, plan.voters)} - {self.me})
        if not self.is_begun:
            return self._form(now_s) if losers else []
        is_ending = self.is_trained and self.phase != "serving"  # the final state is on its way
        if leavers <= self._seen_off or is_ending:
            return []
        self._seen_off = leavers
        if self.phase == "serving":
            return self._form(now_s)
        if not losers:
            if self.replanning.chosen is None:
                self.replanning.insist(decision_of(plan))
            return []
        try:
            decision = solve(self.pool.usable(now_s), self.facts, self.manifest, previous=plan)
        except CapacityError:  # nobody can do its part: it need not wait, the job will
            return self._form(now_s)
        self.replanning.insist(decision)
        return self._prepare(decision, plan, now_s)

    # ---- a new generation ------------------------------------------------------------------

    def _form(self, now_s: float) -> list[Effect]:
        """Ask everybody who is needed for the next generation."""
        wanted = self.replanning.take(self.pool.usable(now_s))
        self._broken_links.begun_again()
        self._moved_s = now_s
        self._proposed = Generation(max(self.generation, self._proposed) + 1)
        inquiry = Inquiry(self._proposed, self.plan, self.me, is_begun=self.is_begun)
        self._forming = Forming(
            self.job, self.manifest, self.facts, self.me, self._signature,
            inquiry, wanted, self._prepared(now_s),
        )  # fmt: skip
        try:
            effects = self._forming.ask(self.head, self.pool, now_s, self._leftover)
        except CapacityError as error:
            return self._wait_for_peers(error)
        if self.phase == "waiting":
            self.reason = self._cause
        self.phase = "placing"
        return effects

    def _wait_for_peers(self, error: CapacityError) -> list[Effect]:
        self._forming = None
        if self.phase != "waiting":
            self._cause = self.reason
        before = f" (before that: {self._cause})" if self._cause else ""
        self.phase, self.reason = "waiting", f"{error}{before}"
        return [Hangup(peer) for peer in self.pool.leavers]

    def _on_answer(self, peer: PeerId, answer: Answer, now_s: float) -> list[Effect]:
        forming = self._forming
        self._gone.discard(peer)
        if forming is None:
            # Somebody who takes part has promised itself to a later generation meanwhile.
            is_deserted = not answer.granted and answer.promised > self.generation
            self._proposed = Generation(max(self._proposed, answer.promised))
            return self._form(now_s) if is_deserted and self.is_worker(peer) else []
        forming.inquiry.heard(peer, answer, now_s)
        if forming.inquiry.is_over:
            return self._end("stopped", "it ended while this node was away")
        return forming.insist(self.head, now_s) + self._take_stock(now_s)

    @property
    def _ask_again_s(self) -> float:
        """Candidates ask again after different times; all but the first give others ever more."""
        voters = self.plan.voters if self.plan is not None else ()
        rank = voters.index(self.me) if self.me in voters else len(voters)
        return patience.ASK_AGAIN_S * (1 + rank * min(self._num_outbid + 1, patience.MAX_YIELD))

    def _take_stock(self, now_s: float) -> list[Effect]:
        """Go on with the generation that is being formed, as far as the answers allow."""
        forming = self._forming
        assert forming is not None
        if forming.is_gathering:
            return []
        inquiry = forming.inquiry
        if (successor := inquiry.successor) is not None:
            return self._hand_over(successor)
        if not inquiry.is_settled(now_s):
            if (ahead := inquiry.ahead) is not None:
                self._behind_since_s = min(self._behind_since_s, now_s)
                if now_s - self._behind_since_s >= SEARCH_S:
                    return self._hand_over(ahead)  # whoever knows the later plan may stand
            is_late = now_s - self._moved_s >= self._ask_again_s
            if inquiry.is_refused and is_late and inquiry.is_heard_out(now_s):
                return self._outbid(inquiry, now_s)
            return []
        self._behind_since_s = math.inf
        finished = self._finish_step(forming, now_s)
        try:
            effects = forming.place(self.head, self.pool, now_s, self._disputes.odd)
        except CapacityError as error:
            return finished + self._wait_for_peers(error)
        if forming.missing:
            self._lacking_since_s = min(self._lacking_since_s, now_s)
            rival = inquiry.rival(forming.missing)
            if rival is not None and now_s - self._lacking_since_s >= SEARCH_S:
                return finished + self._hand_over(rival)  # it has the states, we the votes
            if inquiry.is_outbid and now_s - self._moved_s >= self._ask_again_s:
                # Who has it may have promised itself to another candidate: ask for more.
                return finished + self._outbid(inquiry, now_s)
            stages = ", ".join(map(str, forming.missing))
            self.reason = f"nobody here has stage {stages} at step {self.step}; looking for it"
        return finished + effects + self._assign(now_s)

    def _outbid(self, inquiry: Inquiry, now_s: float) -> list[Effect]:
        """Ask again with a number that nobody who answered has promised yet."""
        self._num_outbid += 1
        self._proposed = Generation(max(self._proposed, inquiry.highest_promise))
        return self._form(now_s)

    def _hand_over(self, successor: PeerId) -> list[Effect]:
        self.successor = successor
        self.phase, self.reason = "handed over", f"{successor} coordinates it now"
        return []

    def _finish_step(self, forming: Forming, now_s: float) -> list[Effect]:
        """Commit the step at hand if all its parts are in the logs of those who answered."""
        plan = self.plan
        if plan is None or self.is_trained:
            return []
        found = forming.inquiry.readies(plan, self.step)
        # Where the next number was free, nobody else can have finished the step meanwhile.
        is_ours = plan.coordinator == self.me and self._proposed == plan.generation + 1
        record = self._votes.recover(found, self.step, plan, self.manifest, is_ours=is_ours)
        if record is None:
            return []
        self._votes.clear()  # they are of this step: the next one must not find them
        self._record(record, now_s)
        return [Write(record)]

    def _go_back(self, now_s: float) -> list[Effect]:
        """Some stage is nowhere to be found: all stages go back to the newest complete state."""
        self.go_back()
        self._publications.rewind(self.step)
        self.reason = f"a stage is lost; back to step {self.step}"
        self._votes.clear()
        forming = self._forming
        assert forming is not None
        forming.missing = ()
        return self._take_stock(now_s)

    def _assign(self, now_s: float) -> list[Effect]:
        """Once every state that must move is published: begin the generation."""
        forming = self._forming
        plan = forming.plan_of(self.head, self.pool) if forming is not None else None
        if forming is None or plan is None:
            return []
        plan = replace(plan, links=self.link_codecs.links_of(plan))
        kept = {*plan.workers(), *plan.voters}
        if self._preparing is not None:
            self._leftover |= self._preparing.newcomers.keys()
            self._preparing = None
        before = self.plan.workers() if self.plan else ()
        self._leftover = (self._leftover | {*forming.inquiry.granted, *before}) - kept
        effects: list[Effect] = [Write(on.StartedRecord.of(plan, self.step))]
        effects += forming.assignments(plan, self.head)
        self._forming, self._agreement = None, forming.inquiry
        self._lacking_since_s, self._num_outbid = math.inf, 0
        self._seen_off = set()
        self.plan, self.generation, self.phase = plan, plan.generation, "placing"
        self.is_begun = False
        self._placed.clear()
        self._adopted.clear()
        self._votes.clear()
        self._disputes.assigned()
        self.outlook.measured.disturbed()
        self.replanning.placed(now_s)
        self.stragglers.placed()
        self._moved_s = now_s
        self._publications.give_up_unanswered()
        return effects

    def _begin_generation(self) -> list[Effect] | None:
        """Once all have their states and a majority has the plan: nobody can begin another one.

        All others may forget it then, unless some stage has one holder. None: some are missing.
        """
        plan, agreement = self.plan, self._agreement
        assert plan is not None
        assert agreement is not None
        if self._placed != set(plan.workers()):
            return None
        if not agreement.is_majority(self._placed | self._adopted):
            return None
        self.is_begun = True
        for peer in self._disputes.settled():
            self.pool.exclude(peer)
        let_go = set(filter(self.pool.leaves, self._leftover)) if plan.is_thin else self._leftover
        return [Write(on.BegunRecord(plan.generation)), *self._let_go(let_go)]

    def _failed_once(self, now_s: float) -> list[Effect]:
        self._failures += 1
        if self._failures > patience.MAX_FAILURES:
            return self._end("failed", self.reason)
        return self._form(now_s)

    def _record(self, record: on.CommitRecord, now_s: float) -> None:
        self.record_commit(record, now_s)
        self._failures = 0
        self._broken_links.clear()

    def _on_failed(
        self, peer: PeerId, reason: str, now_s: float, *, child_ended: bool = False
    ) -> list[Effect]:
        """A worker cannot do its part: go on without it, unless nobody can."""
        self.pool.failed(peer, now_s, child_ended=child_ended)
        self.reason = f"{peer}: {reason}"
        workers = self.plan.workers() if self.plan is not None else ()
        if self.pool.is_hopeless(patience.MAX_STRIKES, {*workers}):
            return self._end("failed", self.reason)
        return self._form(now_s)
