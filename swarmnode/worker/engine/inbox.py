"""What waits between the thread that reads the pipe and the one that computes."""

import queue
import threading
from collections import Counter

from swarmnode.domain import SlotId
from swarmnode.engine_messages import EngineMessage
from swarmnode.messages import Frame, Message
from swarmnode.session_messages import SessionClose, SessionFrame
from swarmnode.worker.engine.ports import Payload

LEAST_BYTES = 64 << 20
_MESSAGE_BYTES = 2048
_LOSS_BYTES = 40
"""What a message, and each loss in it, takes besides the payload, as Python objects."""

Received = tuple[Message | EngineMessage, Payload]
_Bounded = Frame | SessionFrame | SessionClose
"""What peers send; all else is the daemon's."""
_Sender = SlotId | type[_Bounded]


class Inbox:
    """Messages in their order. One thread calls `put` and `close`, another one `get`.

    Bound: of the frames of each slot, of all pieces of conversations and of their ends,
    `limit_bytes` wait, or one that is longer. What comes beyond that is dropped: to read no
    further would hold up what the daemon orders, and could let two nodes wait for each other for
    ever. Those orders are not bounded.
    """

    def __init__(self) -> None:
        self.limit_bytes = LEAST_BYTES
        self.num_dropped = 0
        self._queue: queue.SimpleQueue[Received | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting_bytes: Counter[_Sender] = Counter()

    def put(self, message: Message | EngineMessage, payload: Payload) -> None:
        """Add a message, unless its sender has filled its part."""
        if isinstance(message, _Bounded):
            sender, num_bytes = _sender(message), _cost_bytes(message, payload)
            with self._lock:
                waiting_bytes = self._waiting_bytes[sender]
                if waiting_bytes and waiting_bytes + num_bytes > self.limit_bytes:
                    self.num_dropped += 1
                    return
                self._waiting_bytes[sender] += num_bytes
        self._queue.put((message, payload))

    def close(self) -> None:
        """Let `get` raise EOFError behind what was put before."""
        self._queue.put(None)

    def get(self, *, block: bool) -> Received | None:
        """The next message; None if there is none yet and `block` is False. Raises: EOFError."""
        try:
            received = self._queue.get(block=block)
        except queue.Empty:
            return None
        if received is None:
            raise EOFError("the pipe is closed")
        message, payload = received
        if isinstance(message, _Bounded):
            with self._lock:
                self._waiting_bytes[_sender(message)] -= _cost_bytes(message, payload)
        return received


def _sender(message: _Bounded) -> _Sender:
    return message.source if isinstance(message, Frame) else type(message)


def _cost_bytes(message: _Bounded, payload: Payload) -> int:
    num_losses = len(message.losses) if isinstance(message, Frame) else 0
    return _MESSAGE_BYTES + _LOSS_BYTES * num_losses + len(payload)
