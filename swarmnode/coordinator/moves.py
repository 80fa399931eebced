"""A move to another placement in the making: who fetches what meanwhile, and when it is time."""

from collections.abc import Mapping, Sequence, Set

from swarmnode.coordinator import patience
from swarmnode.coordinator.events import Effect
from swarmnode.coordinator.job_state import JobState
from swarmnode.coordinator.preparing import Preparing
from swarmnode.coordinator.shadows import choose_shadows
from swarmnode.coordinator.solver.decision import Decision, decision_of
from swarmnode.coordinator.solver.fill import solve
from swarmnode.domain import ModelFacts, PeerId, Plan
from swarmnode.errors import CapacityError
from swarmnode.manifest import Manifest


class Moves(JobState):
    """A job whose next placement is made ready while the one at hand works.

    Going over to it is the affair of the generations.
    """

    def __init__(
        self, manifest: Manifest, facts: ModelFacts, me: PeerId, signature: bytes, now_s: float
    ) -> None:
        super().__init__(manifest, facts, me, now_s)
        self._signature = signature
        self._preparing: Preparing | None = None
        self._thin_until_s = now_s
        """When to look again for a second holder of a stage."""
        self._seen_off: set[PeerId] = set()
        """Workers and voters of the plan who leave, and because of whom a move is being made."""

    @property
    def newcomers(self) -> Set[PeerId]:
        """Peers that fetch what they need for a plan to come."""
        return self._preparing.newcomers.keys() if self._preparing is not None else frozenset()

    def _prepared(self, now_s: float) -> Mapping[PeerId, Sequence[int]]:
        """Who has fetched which stages, or has had its time for it: without that nobody would ever
        learn that it cannot, nor would a line that is slower than the log is long ever do."""
        preparing = self._preparing
        if preparing is None or not (preparing.is_ready or preparing.is_overdue(now_s)):
            return {}
        return preparing.newcomers

    def _prepare(self, decision: Decision, plan: Plan, now_s: float) -> list[Effect]:
        if self.is_trained:
            return []
        shadows = self._shadows_of(decision, plan, now_s)
        self._preparing = Preparing(
            self.job, decision, shadows, plan, self.pool.leaves, self.facts, now_s
        )
        return self._preparing.begin(self._signature)

    def _give_up_preparing(self) -> None:
        """One of the newcomers is gone: whoever is to be seen off gets other successors."""
        self._preparing = self.replanning.chosen = None
        self._seen_off = set()

    def _shadows_of(
        self, decision: Decision, plan: Plan, now_s: float
    ) -> tuple[tuple[PeerId, ...], ...]:
        peers = self.pool.usable(now_s)
        return choose_shadows(
            decision, peers, self.facts, self.manifest, lambda s, peer: peer in plan.holders(s)
        )

    def _second_holders(self, now_s: float) -> list[Effect]:
        """A stage that a single machine holds gets another one, as soon as there is one."""
        plan, is_busy = self.plan, self._preparing or self.replanning.chosen
        if plan is None or self.phase != "training" or is_busy or now_s < self._thin_until_s:
            return []
        if not plan.is_thin:
            return []
        self._thin_until_s = now_s + patience.SECOND_HOLDER_S
        decision = decision_of(plan)
        shadows = self._shadows_of(decision, plan, now_s)
        if not any(set(dark) - set(plan.holders(s)) for s, dark in enumerate(shadows)):
            return []
        self.replanning.insist(decision)
        return self._prepare(decision, plan, now_s)

    def _sends_straggler_away(self, now_s: float) -> bool:
        """Whether one worker alone makes the step late, and others can do without it: its slots
        are to begin the step again elsewhere."""
        plan = self.plan
        if plan is None or self.phase != "training":
            return False
        peer = self.stragglers.find(plan.workers(), now_s)
        others = [advert for advert in self.pool.usable(now_s) if advert.peer != peer]
        if peer is None or peer == self.me or not others:
            return False
        try:
            solve(others, self.facts, self.manifest, previous=plan)
        except CapacityError:
            return False
        self.stragglers.sent_away(peer, now_s)
        self.pool.bar(peer, now_s)
        self.reason = f"{peer} computes far longer than usual; its slots go to others"
        return True

    def _is_time_to_move(self, now_s: float) -> bool:
        """At a step boundary: whether to go over to another placement now."""
        preparing = self._preparing
        if preparing is not None and not preparing.is_ready:
            return preparing.is_overdue(now_s)
        return self.replanning.chosen is not None or bool(self._seen_off) or self.recodes_links()
