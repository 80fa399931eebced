"""Which conversations this node holds a KV cache for: a few, and the oldest idle one goes first."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

CacheT = TypeVar("CacheT")

MAX_SESSIONS = 4


class SessionKey(NamedTuple):
    """One conversation at one stage; a node that hosts two stages holds two caches of it."""

    session: str
    stage: int


@dataclass
class Held(Generic[CacheT]):
    """A session's cache and the number of positions in it."""

    cache: CacheT
    num_positions: int = 0


SessionRefusal = Literal["gone", "positions"]


class Sessions(Generic[CacheT]):
    """The held sessions, by last use.

    Bound: at most `max_sessions` conversations, each with one cache for each hosted stage.
    """

    def __init__(self, max_sessions: int = MAX_SESSIONS) -> None:
        self._max_sessions = max_sessions
        self._held: OrderedDict[str, dict[int, Held[CacheT]]] = OrderedDict()

    def refusal(self, key: SessionKey, start: int) -> SessionRefusal | None:
        """Why positions from `start` on cannot be computed next, or None if they can.

        gone: there is no cache (evicted, or never begun). positions: it ends elsewhere.
        """
        held = self._held.get(key.session, {}).get(key.stage)
        if held is None:
            return None if start == 0 else "gone"
        return None if held.num_positions == start else "positions"

    def get(self, key: SessionKey) -> Held[CacheT] | None:
        """The session's cache at a stage, and count this as its last use."""
        if key.session not in self._held:
            return None
        self._held.move_to_end(key.session)
        return self._held[key.session].get(key.stage)

    def add(self, key: SessionKey, cache: CacheT) -> Held[CacheT]:
        """Hold a new, empty cache; the conversation unused for longest gives way."""
        caches = self._held.setdefault(key.session, {})
        self._held.move_to_end(key.session)
        while len(self._held) > self._max_sessions:
            self._held.popitem(last=False)
        return caches.setdefault(key.stage, Held(cache))

    def close(self, session: str, stage: int) -> None:
        """Forget the session at a stage, if it is held."""
        caches = self._held.get(session, {})
        caches.pop(stage, None)
        if not caches:
            self._held.pop(session, None)

    def __len__(self) -> int:
        return len(self._held)
