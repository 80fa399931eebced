"""When to look for a better placement of a running job, and whether to take what was found."""

import math
from collections.abc import Sequence

from swarmnode.coordinator.solver.decision import Decision
from swarmnode.coordinator.solver.request import Improvement
from swarmnode.coordinator.transition import Churn, Move
from swarmnode.domain import Advert, Generation, PeerId

SETTLE_S = 5.0
"""After any change of placement no move of choice, and time to see how fast the machines are.
Doubles with every move of choice while nobody comes or goes: what does not settle is noise."""
MOST_DOUBLINGS = 7
PERIOD_S = 60.0
"""Speeds and links drift: look again this often, also when nobody came or left."""
PATIENCE_S = 320.0
"""An answer that takes longer than this was lost with the solver that worked on it."""


class Replanning:
    """The better placement in the making: asked for, answered, judged, waiting for its moment."""

    def __init__(self, now_s: float) -> None:
        self.churn = Churn(now_s)
        self.chosen: Decision | None = None
        """A placement that is worth the move; taken at the next step boundary."""
        self.verdict = ""
        """Why the newest answer was not taken, in words."""
        self._peers: frozenset[PeerId] | None = None
        self._placed_s = now_s
        self._asked_s = -math.inf
        self._is_waiting = False
        self._is_due = False
        self._num_moves = 0
        self._is_other_crowd = False
        self._is_deaf = False

    def see(self, peers: Sequence[Advert]) -> None:
        """Who may be given work now; a change is a reason to look again."""
        now = frozenset(advert.peer for advert in peers)
        if self._peers is not None and now != self._peers:
            self.churn.changed()
            self._is_due = self._is_other_crowd = True
            self._num_moves = 0
        self._peers = now

    def placed(self, now_s: float) -> None:
        """A new generation begins: what was found for the old one is void."""
        self.chosen = None
        self.verdict = ""
        self._is_waiting = False
        self._is_due = True
        self._placed_s = now_s

    def serves(self) -> None:
        """The steps are done, conversations begin: what was asked about steps is void."""
        self.chosen = None
        self._is_waiting = self._is_other_crowd = False
        self._is_deaf = True

    def wants_answer(self, now_s: float, *, serves: bool = False) -> bool:
        """Whether the solver should be asked now; it then counts as asked.

        A move interrupts conversations: while a job `serves`, only who comes or goes is a reason.
        """
        if serves and not self._is_other_crowd:
            return False
        if self._is_waiting and now_s - self._asked_s < PATIENCE_S:
            return False
        settle_s = SETTLE_S * 2.0 ** min(self._num_moves, MOST_DOUBLINGS)
        if now_s - self._placed_s < settle_s or self.chosen is not None:
            return False
        if not self._is_due and now_s - self._asked_s < PERIOD_S:
            return False
        self._is_waiting, self._is_due, self._asked_s = True, False, now_s
        self._is_other_crowd = self._is_deaf = False
        return True

    def answered(
        self, current: Generation, asked: Generation, found: Improvement | None, now_s: float
    ) -> None:
        """The solver's answer, None if it had none; asked about generation `asked`."""
        if asked != current or self._is_deaf:
            return
        self._is_waiting = False
        if found is None:
            self.verdict = "the solver gave no answer"
            return
        current_s = math.inf if found.current_s is None else found.current_s
        move = Move(current_s, found.decision.cost_s, found.move_s)
        refusal = move.refusal(self.churn.calm_s(now_s))
        self.verdict = refusal or ""
        self.chosen = found.decision if refusal is None else None

    def insist(self, decision: Decision) -> None:
        """A move that must be made; the solver did not know why when it was last asked."""
        self.chosen = decision
        self._is_waiting, self._is_deaf = False, True

    def take(self, peers: Sequence[Advert]) -> Decision | None:
        """The chosen placement, once, if every machine of it is still here."""
        chosen, self.chosen = self.chosen, None
        here = {advert.peer for advert in peers}
        if chosen is None or not {peer for row in chosen.slots for peer in row} <= here:
            return None
        self._num_moves += 1
        return chosen
