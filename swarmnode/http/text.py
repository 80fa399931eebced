"""From tokens to text, piece by piece: whole characters only, and nothing past a stop string."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
MAX_HELD = 3
"""A character has at most four bytes: at most three may wait for the last one."""


class TextDecoder:
    """Turns a growing list of tokens into text that never changes once it was given out.

    Tokens may end in the middle of a character, which decodes to replacement characters; up to
    MAX_HELD of them are held back until the next tokens show what they are.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._clean = 0
        self._given = 0

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._window.append(token)
        text = self._decode(self._window)
        held = min(MAX_HELD, len(text) - len(text.rstrip(REPLACEMENT)))
        piece = text[self._given : len(text) - held]
        self._given += len(piece)
        if held == 0:
            # Keep the tokens since the last clean point: decoding depends on what stands before.
            self._window = self._window[self._clean :]
            self._clean = len(self._window)
            self._given = len(self._decode(self._window))
        return piece

    def finish(self) -> str:
        """What was held back, as it is."""
        return self._decode(self._window)[self._given :]


class StopGate:
    """Lets text through up to the first stop string; holds back what may begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far that is certain to come before any stop string."""
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            free, self._held = self._held[: min(found)], ""
            return free
        num_free = len(self._held) - self._num_pending()
        free, self._held = self._held[:num_free], self._held[num_free:]
        return free

    def finish(self) -> str:
        """What was held back: no stop string can follow any more."""
        free, self._held = self._held, ""
        return free

    def _num_pending(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
