"""Whether a worker child hangs: it is asked, and answers between two pieces of work."""

from dataclasses import dataclass

CONFIGURE_S = 800.0
"""A child that makes ready for a generation may take so long; less than its coordinator's 900 s."""
_LOOKS = 20
"""Looks at a child in the time after which it is given up."""


@dataclass(frozen=True)
class Configuring:
    """The child is told next to make ready for a generation."""


@dataclass(frozen=True)
class Answered:
    """The child has answered the question."""


@dataclass(frozen=True)
class Look:
    """Regularly, every `look_s`."""

    is_listening: bool
    """Whether the daemon waits for the child's next word, and for nothing else."""


@dataclass(frozen=True)
class Ask:
    """Ask the child, behind all that it was told so far."""


@dataclass(frozen=True)
class GiveUp:
    """The child will not answer any more: end it."""

    silent_s: float


class ChildWatch:
    """Watches one child, from the first generation that it is made ready for.

    A child takes its messages in order, so one question is open at a time, and the one behind
    an order to make ready may take as long as that. Only time between regular looks counts, and
    only while the daemon listens: a daemon that was stopped, or that cannot hand on what the
    child said before, gives up nobody for it.
    """

    def __init__(self, hang_s: float) -> None:
        """`hang_s`: how long any other answer may take."""
        self.look_s = hang_s / _LOOKS
        """Seconds between two looks."""
        self._hang_s = hang_s
        self._limit_s: float | None = None
        """How long the answer to the open question may take; None if no question is open."""
        self._silent_s = 0.0
        self._looked_s = 0.0
        self._is_begun = False
        self._is_configuring = False
        """Whether an order to make ready was given since the last question."""

    def handle(self, event: Configuring | Answered | Look, now_s: float) -> list[Ask | GiveUp]:
        match event:
            case Configuring():
                self._is_begun = self._is_configuring = True
                return self._ask(now_s) if self._limit_s is None else []
            case Answered():
                self._limit_s = None
                return self._ask(now_s) if self._is_configuring else []
            case Look(is_listening):
                return self._look(now_s, is_listening=is_listening)

    def _ask(self, now_s: float) -> list[Ask | GiveUp]:
        self._limit_s = max(CONFIGURE_S, self._hang_s) if self._is_configuring else self._hang_s
        self._is_configuring = False
        self._silent_s, self._looked_s = 0.0, now_s
        return [Ask()]

    def _look(self, now_s: float, *, is_listening: bool) -> list[Ask | GiveUp]:
        if self._limit_s is None:
            return self._ask(now_s) if self._is_begun else []
        if is_listening:
            self._silent_s += min(now_s - self._looked_s, 2 * self.look_s)
        self._looked_s = now_s
        if self._silent_s <= self._limit_s:
            return []
        self._limit_s = float("inf")  # once is enough
        return [GiveUp(self._silent_s)]
