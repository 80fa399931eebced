"""The question before every generation: who takes part, who agrees, who holds what."""

import math
from collections.abc import Collection, Iterable, Sequence, Set

from swarmnode.domain import Generation, PeerId, Plan
from swarmnode.messages import (
    Answer,
    Ready,
)

GRACE_S = 1.0
"""Once a majority has agreed, the others have this long to answer too."""
RETRY_S = 2.0
"""Who could not be reached is asked again after so long, while it is needed."""
UNANSWERED_S = 10.0
"""So is who was reached and does not answer, or refused."""
CHECKING_S = 5.0
"""Nor is who said within so long that it reads its disk, and answers then."""


class Inquiry:
    """One proposed generation: asked, answered, agreed by a majority of the last plan's voters.

    The first voter of a group wins ties: of two nodes the one that coordinates goes on alone.
    """

    def __init__(
        self, generation: Generation, before: Plan | None, me: PeerId, *, is_begun: bool = True
    ) -> None:
        """`is_begun`: whether the plan `before` is known to have begun. If not, it takes those who
        could have begun it: the coordinator, who knows that it has not, needs no others."""
        self.generation = generation
        self.granted: dict[PeerId, Answer] = {}
        """Who agreed, and what they hold."""
        self._me = me
        self._is_incumbent = before is None or before.coordinator == me
        self.quorums = [(before.voters if before else ()) or (me,)]
        """Of each of these groups a majority must agree."""
        if before is not None and not is_begun and before.voters_before:
            others = [] if self._is_incumbent else self.quorums
            self.quorums = [*others, before.voters_before]
        self._all_count = before is None or not (is_begun or before.voters_before)
        """Nothing has begun yet, so that nobody can have forgotten it."""
        self._forgetful: set[PeerId] = set()
        self._known = before.generation if before else Generation(0)
        self._coordinator = before.coordinator if before is not None else me
        self._told: set[PeerId] = set()
        """Who was told that the job has ended."""
        self._refused: dict[PeerId, Answer] = {}
        self._insisted: set[PeerId] = set()
        self._asked_s: dict[PeerId, float] = {}
        self._lost: set[PeerId] = set()
        self._checked_s: dict[PeerId, float] = {}
        """When a peer that has not answered said last that it reads its disk."""
        self.checked_s = -math.inf
        """When anybody said so last: an answer may still show what nobody else has."""
        self._agreed_s: float | None = None

    def ask(self, peers: Iterable[PeerId], now_s: float) -> list[PeerId]:
        """Those of `peers` who are to be asked now: never before, or long enough ago in vain."""
        due = []
        for peer in sorted(set(peers)):
            waited_s = now_s - self._asked_s.get(peer, -math.inf)
            patience_s = RETRY_S if peer in self._lost else UNANSWERED_S
            is_checking = now_s - self._checked_s.get(peer, -math.inf) <= CHECKING_S
            is_due = waited_s >= patience_s and not is_checking
            if is_due and peer not in self.granted:
                self._asked_s[peer] = now_s
                self._lost.discard(peer)
                due.append(peer)
        return due

    @property
    def voters(self) -> frozenset[PeerId]:
        """Everybody whose word counts."""
        return frozenset(peer for group in self.quorums for peer in group)

    def again(self, now_s: float) -> list[PeerId]:
        """Everybody who was asked in vain, once it is time to try again."""
        return self.ask(self._asked_s.keys() | self.voters, now_s)

    def insist(self) -> list[PeerId]:
        """Who refused although it has promised nothing as high, once a majority has agreed: it may
        hold what we need, and has adopted a plan that can never begin. To be asked again, once."""
        if not self.is_agreed:
            return []
        due = sorted(
            peer
            for peer, answer in self._refused.items()
            if answer.promised < self.generation and peer not in self._insisted
        )
        for peer in due:
            del self._refused[peer], self._asked_s[peer]
            self._insisted.add(peer)
        return due

    def heard(self, peer: PeerId, answer: Answer, now_s: float) -> None:
        """An answer to this question."""
        if peer not in self._asked_s or answer.generation != self.generation:
            return
        self._lost.discard(peer)
        self._checked_s.pop(peer, None)
        if answer.is_over:
            self._told.add(peer)
        if answer.is_new and not self._all_count:
            self._forgetful.add(peer)  # who has lost its promises may work, not vote
        if answer.granted:
            self.granted[peer] = answer
            self._refused.pop(peer, None)
        else:
            self._refused[peer] = answer
        if self._agreed_s is None and self.has_majority:
            self._agreed_s = now_s

    def has_refused(self, peer: PeerId) -> bool:
        """Whether the peer has answered, and said no: it closes its stream then."""
        return peer in self._refused

    def checking(self, peer: PeerId, now_s: float) -> None:
        """The peer was reached, and reads its disk before it answers."""
        if peer in self._asked_s:
            self._lost.discard(peer)
            self._checked_s[peer] = self.checked_s = now_s

    def lost(self, peer: PeerId) -> None:
        """The peer cannot be reached: it takes no part. If it refused, that still counts."""
        self._checked_s.pop(peer, None)
        if peer in self._asked_s:
            self._lost.add(peer)
            self.granted.pop(peer, None)

    def is_majority(self, agreed: Set[PeerId]) -> bool:
        """Whether `agreed` are enough of every group."""
        return all(self._is_enough(group, agreed) for group in self.quorums)

    def _is_enough(self, group: Sequence[PeerId], agreed: Set[PeerId]) -> bool:
        agreed = agreed - self._forgetful
        count = sum(voter in agreed for voter in group)
        is_tie = group[0] == self._me and self._me in agreed  # nobody else is first of this group
        return 2 * count > len(group) or (is_tie and 2 * count == len(group))

    @property
    def has_majority(self) -> bool:
        return self.is_majority(self.granted.keys())

    @property
    def is_agreed(self) -> bool:
        """Whether nothing can begin any more but what follows on the last plan that we know."""
        return self.has_majority and self._known > 0

    def is_settled(self, now_s: float) -> bool:
        """Whether a majority agreed, and everybody else has had time to answer."""
        if self._agreed_s is None or not self.has_majority:
            return False
        missing = self._asked_s.keys() - self._lost - self.granted.keys() - self._refused.keys()
        return not missing or now_s - self._agreed_s >= GRACE_S

    def is_heard_out(self, now_s: float) -> bool:
        """Whether no voter's answer is on its way: one more may show whom a majority follows."""
        pending = self.voters & self._asked_s.keys() - self._lost
        pending -= self.granted.keys() | self._refused.keys()
        return all(now_s - self._asked_s[peer] >= GRACE_S for peer in pending)

    def readies(self, plan: Plan, step: int) -> list[Ready]:
        """What holders of `plan` said of `step`, as far as their logs have the update."""
        return [
            ready
            for peer, answer in sorted(self.granted.items())
            for ready in answer.ready
            if ready.generation == plan.generation and ready.step == step
            if ready.source in plan and plan.host(ready.source) == peer
        ]

    @property
    def is_over(self) -> bool:
        """Whether the job has ended: the coordinator so far says so, or a majority of a group."""
        return self._coordinator in self._told or any(
            2 * sum(voter in self._told for voter in group) > len(group) for group in self.quorums
        )

    @property
    def successor(self) -> PeerId | None:
        """Whom a majority of some group follows instead, if it does. A promise to somebody who is
        not heard of any more binds nobody.

        Our own voice goes to it too, where we cannot win: too many have adopted a later plan than
        we know, and will never agree to ours.
        """
        later = self._followers()
        for group in self.quorums:
            agreeable = {voter for voter in group if voter not in self._unwilling()}
            voices = set() if self._is_enough(group, agreeable) else {self._me}
            for peer in sorted(set(later.values()) - {self._me}):
                follow = {voter for voter in group if voter in voices or later.get(voter) == peer}
                if 2 * len(follow) > len(group):
                    return peer
        return None

    @property
    def ahead(self) -> PeerId | None:
        """Who led those last that have adopted a later plan than we know, where we cannot win
        without them."""
        unwilling = self._unwilling()
        if all(self._is_enough(group, set(group) - unwilling) for group in self.quorums):
            return None
        leaders = {self._refused[p].promised_to: self._refused[p].adopted for p in unwilling}
        return max(sorted(leaders.keys() - {self._me}), key=leaders.__getitem__, default=None)

    def _unwilling(self) -> set[PeerId]:
        """Who has adopted a later plan than we know."""
        return {peer for peer, answer in self._refused.items() if answer.adopted > self._known}

    def rival(self, stages: Collection[int]) -> PeerId | None:
        """Whom some of those follow who refused and hold one of `stages`, if they do."""
        followed = {
            promised_to
            for peer, promised_to in self._followers().items()
            if any(held.stage in stages for held in self._refused[peer].held)
        }
        return min(followed - {self._me}, default=None)

    def _followers(self) -> dict[PeerId, PeerId]:
        return {
            peer: answer.promised_to
            for peer, answer in self._refused.items()
            if answer.promised > self._known and answer.in_touch
            if peer not in self._forgetful
        }

    @property
    def is_outbid(self) -> bool:
        """Whether somebody refused because it has promised itself as high to another."""
        return any(answer.promised >= self.generation for answer in self._refused.values())

    @property
    def highest_promise(self) -> Generation:
        """What the next question must exceed."""
        answers = (*self.granted.values(), *self._refused.values())
        return max((a.promised for a in answers), default=self.generation)

    @property
    def is_refused(self) -> bool:
        """Whether those who refused would make the majority: then a higher number may."""
        if self._refused and self.is_majority(self.granted.keys() | self._refused.keys()):
            return not self.has_majority
        return any(
            2 * sum(voter in self._refused for voter in group) >= len(group)
            for group in self.quorums
        )
