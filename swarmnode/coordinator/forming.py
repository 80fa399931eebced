"""A generation in the making: asked for, agreed on, placed, and every state on its way."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial

from swarmnode.coordinator.events import Effect, Hangup, Send
from swarmnode.coordinator.inquiry import RETRY_S, Inquiry
from swarmnode.coordinator.pool import Pool
from swarmnode.coordinator.recovery import CommitLog, Finder, Origin, Sources, state_bytes
from swarmnode.coordinator.shadows import choose_shadows, choose_voters
from swarmnode.coordinator.solver.decision import Decision
from swarmnode.coordinator.solver.fill import solve, stage_ranges
from swarmnode.domain import Advert, Generation, JobId, ModelFacts, PeerId, Plan
from swarmnode.errors import CapacityError
from swarmnode.manifest import Manifest
from swarmnode.messages import (
    Adopt,
    Assign,
    Committed,
    Inquire,
    Save,
    Saved,
    StateSource,
)

AT_ONCE_BYTES = 32 << 20
"""A state up to so large is fetched before the job goes on: three seconds at 100 Mbit/s."""
MAX_ASKED = 32
"""Usable peers that are asked besides those whom the last plan and the new one name."""
SEARCH_S = 20.0
"""A stage that nobody can give is looked for so long: a disk may come back. Longer where what
would be given up took longer to compute: so at most twice that time is lost."""
MAX_SEARCH_S = 600.0
CHECK_S = 900.0
"""So long at most while somebody who may have it says that it reads its disk."""


@dataclass(frozen=True)
class Head:
    """Where the job stands: what every generation starts from."""

    step: int
    plan: Plan | None
    is_begun: bool
    commits: CommitLog
    origin: Origin

    @property
    def begun_voters(self) -> tuple[PeerId, ...]:
        """The voters of the last plan that is known to have begun."""
        if self.plan is None:
            return ()
        return self.plan.voters if self.is_begun else self.plan.voters_before


@dataclass
class Forming:
    """From the question to the assignments. `plan` is None until everybody's source is known."""

    job: JobId
    manifest: Manifest
    facts: ModelFacts
    me: PeerId
    signature: bytes
    inquiry: Inquiry
    wanted: Decision | None
    """A placement that was chosen before; taken if all its machines agree."""
    prepared: Mapping[PeerId, Sequence[int]] = field(default_factory=dict)
    """Who was to fetch which stages meanwhile; what it still lacks of them is waited for."""
    missing: tuple[int, ...] = ()
    """Stages whose state nobody can give so far."""
    _missing_since_s: float = math.inf
    _decision: Decision | None = None
    _shadows: tuple[tuple[PeerId, ...], ...] = ()
    _sources: Sources = field(default_factory=Sources)
    _saved: dict[int, StateSource] = field(default_factory=dict)

    def ask(
        self, head: Head, pool: Pool, now_s: float, holders: Set[PeerId] = frozenset()
    ) -> list[Effect]:
        """Put the question to whoever is needed; `holders` may have states besides the last plan's.

        Raises: CapacityError if those who are here cannot do the job at all.
        """
        peers = pool.usable(now_s)
        wanted = self.wanted or solve(peers, self.facts, self.manifest, previous=head.plan)
        named = {peer for row in wanted.slots for peer in row} | {self.me} | holders
        if head.plan is not None:
            named |= {*self.inquiry.voters, *head.plan.workers()}
        others = [advert.peer for advert in peers if advert.peer not in named]
        return self._inquire([*named, *others[:MAX_ASKED]], head, now_s)

    def again(self, head: Head, pool: Pool, now_s: float) -> list[Effect]:
        """Ask those who were not reached once more; anybody new too, while something is missing."""
        due = self.inquiry.again(now_s)
        found = self._inquire([], head, now_s, due)
        if self.missing and now_s - self._missing_since_s > RETRY_S:
            newcomers = [advert.peer for advert in pool.usable(now_s)]
            old = head.plan.workers() if head.plan is not None else ()
            found += self._inquire([*old, *newcomers], head, now_s)
        return found

    def insist(self, head: Head, now_s: float) -> list[Effect]:
        """Ask those again, on a new line, who refused what a majority has agreed to."""
        due = self.inquiry.insist()
        return [Hangup(peer) for peer in due] + self._inquire(due, head, now_s)

    def _inquire(
        self, peers: list[PeerId], head: Head, now_s: float, due: list[PeerId] | None = None
    ) -> list[Effect]:
        before = head.plan.generation if head.plan is not None else Generation(0)
        generation = self.inquiry.generation
        known = generation if self.inquiry.is_agreed else before
        inquire = Inquire(self.job, generation, known, 0, self.signature)
        return [Send(peer, inquire) for peer in due or self.inquiry.ask(peers, now_s)]

    def is_overdue(self, now_s: float, redo_s: float) -> bool:
        """Whether what is missing, and would take `redo_s` to compute again, has been looked for
        long enough."""
        since_s = self._missing_since_s
        silent_s = now_s - max(since_s, self.inquiry.checked_s)
        patience_s = max(SEARCH_S, min(redo_s, MAX_SEARCH_S))
        return bool(self.missing) and (silent_s >= patience_s or now_s - since_s >= CHECK_S)

    @property
    def is_gathering(self) -> bool:
        """Whether some holder was asked to publish its state and has not done so."""
        return self._decision is not None

    def place(
        self, head: Head, pool: Pool, now_s: float, odd: Mapping[int, frozenset[PeerId]]
    ) -> list[Effect]:
        """All have answered: decide who does what, and where each gets its state.

        `odd`: by stage, holders whose state is another than that of most.
        Afterwards either something is `missing`, or `is_gathering`, or `plan_of` has an answer.
        Raises: CapacityError.
        """
        granted = self.inquiry.granted
        peers = [advert for advert in pool.usable(now_s) if advert.peer in granted]
        finder_of = partial(
            Finder, granted, step=head.step, commits=head.commits, beginning=head.origin, odd=odd
        )
        decision = self.wanted
        named = {peer for row in decision.slots for peer in row} if decision is not None else set()
        if decision is None or not named <= granted.keys() or any(map(pool.leaves, named)):
            finder = finder_of(stage_ranges(self.facts, self.manifest))
            decision, peers = self._decide(head, peers, partial(self._is_near, finder))
        finder = finder_of(decision.layers)
        self._shadows = choose_shadows(
            decision, peers, self.facts, self.manifest, finder.holds, partial(self._is_near, finder)
        )
        holders = [(*row, *dark) for row, dark in zip(decision.slots, self._shadows, strict=True)]
        self._sources = finder.find(holders)
        self.missing = tuple(sorted(set(self._sources.lost)))
        if self.missing:
            self._missing_since_s = min(self._missing_since_s, now_s)
            return []
        self._decision = decision
        generation = self.inquiry.generation
        saves = self._sources.saves
        return [
            Send(peer, Save(self.job, generation, step, stage))
            for stage, (peer, step) in saves.items()
        ]

    def _is_near(self, finder: Finder, stage: int, peer: PeerId) -> bool:
        """Whether nobody has to wait long until `peer` has the state of `stage`: what is large,
        and held by somebody else, is fetched while the job goes on."""
        is_small = state_bytes(self.facts, finder.layers, stage) <= AT_ONCE_BYTES
        was_told = stage in self.prepared.get(peer, ())
        return is_small or was_told or finder.holds(stage, peer) or not finder.is_held(stage)

    def _decide(
        self, head: Head, peers: list[Advert], is_near: Callable[[int, PeerId], bool]
    ) -> tuple[Decision, list[Advert]]:
        """A placement, and who takes part: at first those alone who can compute at once, where
        these hold every stage between them. The others get their share when they are ready."""
        plan, granted = head.plan, self.inquiry.granted
        warm = [advert for advert in peers if granted[advert.peer].is_warm]
        held = {held.stage for advert in warm for held in granted[advert.peer].held}
        if plan is not None and held == set(range(plan.num_stages)):
            with contextlib.suppress(CapacityError):
                return solve(warm, self.facts, self.manifest, previous=plan, is_near=is_near), warm
        return solve(peers, self.facts, self.manifest, previous=plan, is_near=is_near), peers

    def saved(self, peer: PeerId, saved: Saved) -> None:
        """A holder has published the state that others wait for."""
        if self._sources.saves.get(saved.stage) == (peer, saved.step):
            source = StateSource("fetch", saved.step, saved.index, (peer,))
            self._saved[saved.stage] = source

    def plan_of(self, head: Head, pool: Pool) -> Plan | None:
        """The plan, once every state is at hand."""
        decision = self._decision
        if decision is None or self._saved.keys() != self._sources.saves.keys():
            return None
        granted = self.inquiry.granted
        stay = {p: said for p, said in granted.items() if p == self.me or not pool.leaves(p)}
        voters = choose_voters(self.me, decision.slots, self._shadows, stay)
        grids = (decision.slots, self._shadows)
        named = [self.me, *(peer for grid in grids for row in grid for peer in row)]
        addresses = pool.addresses(sorted({*named, *granted}))
        return decision.plan(
            self.inquiry.generation, self.me, addresses, self._shadows, voters, head.begun_voters
        )

    def assignments(self, plan: Plan, head: Head) -> list[Effect]:
        """What each holder is told."""
        for stage, peer in self._sources.waiting:
            self._sources.add(peer, stage, self._saved[stage])
        commits: tuple[Committed, ...] = (
            head.commits.since(self._sources.first_step, head.step) or ()
        )
        bystanders = sorted({*self.inquiry.voters, *plan.voters} - set(plan.workers()))
        adopts: list[Effect] = [Send(peer, Adopt(self.job, plan)) for peer in bystanders]
        return adopts + [
            Send(
                peer,
                Assign(
                    self.job, plan, head.step, tuple(sorted(sources, key=lambda pair: pair[0])),
                    self.signature, commits,
                ),
            )
            for peer, sources in sorted(self._sources.by_peer.items())
        ]  # fmt: skip
