"""The question before every generation: who takes part, who agrees, who holds what."""

import math
from collections.abc import Iterable

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


class Inquiry:
    """One proposed generation: asked, answered, agreed by a majority of the last plan's voters.

    The coordinator so far wins ties, so that of two nodes the one that coordinates goes on alone.
    """

    def __init__(self, generation: Generation, before: Plan | None, me: PeerId) -> None:
        self.generation = generation
        self.granted: dict[PeerId, Answer] = {}
        """Who agreed, and what they hold."""
        self._me = me
        self._voters = (before.voters if before else ()) or (me,)
        self._known = before.generation if before else Generation(0)
        self._is_incumbent = before is None or before.coordinator == me
        self._refused: dict[PeerId, Answer] = {}
        self._asked_s: dict[PeerId, float] = {}
        self._lost: set[PeerId] = set()
        self._agreed_s: float | None = None

    def ask(self, peers: Iterable[PeerId], now_s: float) -> list[PeerId]:
        """Those of `peers` who are to be asked now: never before, or long enough ago in vain."""
        due = []
        for peer in sorted(set(peers)):
            waited_s = now_s - self._asked_s.get(peer, -math.inf)
            patience_s = RETRY_S if peer in self._lost else UNANSWERED_S
            if waited_s >= patience_s and peer not in self.granted:
                self._asked_s[peer] = now_s
                self._lost.discard(peer)
                due.append(peer)
        return due

    def again(self, now_s: float) -> list[PeerId]:
        """Everybody who was asked in vain, once it is time to try again."""
        return self.ask(self._asked_s.keys() | set(self._voters), now_s)

    def heard(self, peer: PeerId, answer: Answer, now_s: float) -> None:
        """An answer to this question."""
        if peer not in self._asked_s or answer.generation != self.generation:
            return
        self._lost.discard(peer)
        if answer.granted:
            self.granted[peer] = answer
            self._refused.pop(peer, None)
        else:
            self._refused[peer] = answer
        if self._agreed_s is None and self.has_majority:
            self._agreed_s = now_s

    def lost(self, peer: PeerId) -> None:
        """The peer cannot be reached: it takes no part. If it refused, that still counts."""
        if peer in self._asked_s:
            self._lost.add(peer)
            self.granted.pop(peer, None)

    @property
    def has_majority(self) -> bool:
        for_us = sum(voter in self.granted for voter in self._voters)
        is_tie = self._is_incumbent and self._me in self._voters and self._me in self.granted
        return 2 * for_us > len(self._voters) or (is_tie and 2 * for_us == len(self._voters))

    def is_settled(self, now_s: float) -> bool:
        """Whether a majority agreed, and everybody else has had time to answer."""
        if self._agreed_s is None or not self.has_majority:
            return False
        missing = self._asked_s.keys() - self._lost - self.granted.keys() - self._refused.keys()
        return not missing or now_s - self._agreed_s >= GRACE_S

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
    def successor(self) -> PeerId | None:
        """Whom a majority of the voters follows instead, if they do."""
        followed = [
            answer.promised_to
            for voter, answer in self._refused.items()
            if voter in self._voters and answer.promised > self._known
        ]
        for peer in set(followed) - {self._me}:
            if 2 * followed.count(peer) > len(self._voters):
                return peer
        return None

    @property
    def highest_promise(self) -> Generation:
        """What the next question must exceed."""
        answers = (*self.granted.values(), *self._refused.values())
        return max((a.promised for a in answers), default=self.generation)

    @property
    def is_refused(self) -> bool:
        """Whether no majority can come of it any more without asking with a higher number."""
        against = sum(voter in self._refused for voter in self._voters)
        return 2 * against >= len(self._voters)
