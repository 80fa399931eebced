"""The bytes of a stream: records on the wire, messages inside them, credit that bounds both.

The wire is a sequence of records, each `u32 big-endian (kind << 30 | value)`:
    DATA    value payload bytes follow; all payloads together are `u32 length | bytes` messages
    CREDIT  the receiver may be sent value more bytes
    END     no message follows; the other direction goes on
    BYE     the sender neither sends nor reads any more; what follows is not looked at

Credit, not the muxer's window, holds back a sender whose reader pauses: a muxer may give up on a
stream that nobody reads. A message costs its length plus `MESSAGE_OVERHEAD_BYTES`, so that a flood
of empty messages is bounded as well. So is a flood of CREDIT: each is of `LEAST_CREDIT_BYTES` or
more, and nobody may ever be given more than `WINDOW_BYTES` above what it has sent.
"""

import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from swarmnode.errors import FrameTooLargeError, ProtocolError
from swarmnode.p2p.ports import Buffer

INITIAL_CREDIT_BYTES = 256 << 10
"""What each side may send before it hears of the other."""
WINDOW_BYTES = 16 << 20
"""Most message bytes that wait unread at the receiver: 500 Mbit/s at 150 ms needs 9 MiB."""
LEAST_CREDIT_BYTES = INITIAL_CREDIT_BYTES // 4
"""Least value of a CREDIT: what the smallest window gives back at once."""
MAX_RECORD_BYTES = 256 << 10
"""Largest payload of one DATA record."""
MESSAGE_OVERHEAD_BYTES = 64
"""What a message costs besides its bytes."""
MAX_MESSAGE_BYTES = (1 << 32) - 1
"""Largest length that the message header can hold."""

_WORD = struct.Struct(">I")
_VALUE_MASK = (1 << 30) - 1


class Kind(IntEnum):
    """What a record is."""

    DATA = 0
    CREDIT = 1
    END = 2
    BYE = 3


@dataclass(frozen=True)
class Message:
    """A whole message has arrived."""

    body: bytearray


@dataclass(frozen=True)
class Credit:
    """The peer can take `num_bytes` more."""

    num_bytes: int


@dataclass(frozen=True)
class End:
    """The peer sends no further message."""


@dataclass(frozen=True)
class Bye:
    """The peer has left the stream."""


Event = Message | Credit | End | Bye


def encode_control(kind: Kind, value: int = 0) -> bytes:
    """Return a record without payload."""
    return _WORD.pack(kind << 30 | value)


class Outgoing:
    """One message being cut into DATA records as credit allows."""

    def __init__(self, parts: Sequence[Buffer]) -> None:
        views = (memoryview(part).cast("B") for part in parts)
        self._views = deque(view for view in views if view.nbytes)
        self.num_bytes = sum(view.nbytes for view in self._views)
        self._left_bytes = self.num_bytes
        self.is_started = False

    @property
    def is_done(self) -> bool:
        return self.is_started and self._left_bytes == 0

    def record(self, credit_bytes: int, most_bytes: int = MAX_RECORD_BYTES) -> tuple[bytes, int]:
        """Return the next record, of at most `most_bytes`, and its cost, at most `credit_bytes`;
        (b"", 0) if that is too little."""
        overhead_bytes = 0 if self.is_started else MESSAGE_OVERHEAD_BYTES
        most_bytes = min(most_bytes, MAX_RECORD_BYTES)
        room_bytes = min(credit_bytes - overhead_bytes, most_bytes - _WORD.size)
        body_bytes = min(room_bytes, self._left_bytes)
        if body_bytes < 0 or (self.is_started and body_bytes == 0):
            return b"", 0
        pieces: list[Buffer] = [encode_control(Kind.DATA, body_bytes)]
        if not self.is_started:
            pieces = [encode_control(Kind.DATA, _WORD.size + body_bytes)]
            pieces.append(_WORD.pack(self.num_bytes))
        self.is_started = True
        pieces += self._take(body_bytes)
        return b"".join(pieces), overhead_bytes + body_bytes

    def _take(self, num_bytes: int) -> list[Buffer]:
        self._left_bytes -= num_bytes
        pieces: list[Buffer] = []
        while num_bytes:
            view = self._views.popleft()
            if view.nbytes > num_bytes:
                self._views.appendleft(view[num_bytes:])
                view = view[:num_bytes]
            pieces.append(view)
            num_bytes -= view.nbytes
        return pieces


class Decoder:
    """Bytes of the wire in, events out; checks each length before it holds a byte of the body."""

    def __init__(self, max_message_bytes: int) -> None:
        assert 0 <= max_message_bytes <= MAX_MESSAGE_BYTES
        self._max_message_bytes = max_message_bytes
        self._word = bytearray()
        self._length_word = bytearray()
        self._record_left_bytes = 0
        self._message_bytes = -1
        self._body = bytearray()
        self._is_ended = False
        self._is_left = False
        self.spent_bytes = 0
        """Credit that the peer has spent since the start."""

    def feed(self, chunk: Buffer) -> list[Event]:
        """Return what `chunk` completes, in order; CREDITs one after the other as one.

        Raises: FrameTooLargeError for a message over the limit, ProtocolError for other nonsense.
        """
        events: list[Event] = []
        view = memoryview(chunk)
        while view.nbytes and not self._is_left:
            if self._record_left_bytes:
                taken = self._feed_payload(view[: self._record_left_bytes], events)
                self._record_left_bytes -= taken
            else:
                taken = self._fill(self._word, view)
                if len(self._word) == _WORD.size:
                    self._start_record(_WORD.unpack(self._word)[0], events)
                    self._word.clear()
            view = view[taken:]
        return events

    def _start_record(self, word: int, events: list[Event]) -> None:
        kind, value = Kind(word >> 30), word & _VALUE_MASK
        match kind:
            case Kind.DATA if not self._is_ended and 0 < value <= MAX_RECORD_BYTES:
                self._record_left_bytes = value
            case Kind.CREDIT if value >= LEAST_CREDIT_BYTES:
                if events and isinstance(last := events[-1], Credit):
                    events[-1] = Credit(last.num_bytes + value)
                else:
                    events.append(Credit(value))
            case Kind.END if not self._is_ended and value == 0 and not self._is_inside_message:
                self._is_ended = True
                events.append(End())
            case Kind.BYE if value == 0:
                self._is_left = True
                events.append(Bye())
            case _:
                raise ProtocolError(f"record {kind.name} of {value} makes no sense here")

    @property
    def _is_inside_message(self) -> bool:
        return self._message_bytes >= 0 or bool(self._length_word)

    def _feed_payload(self, view: memoryview, events: list[Event]) -> int:
        if self._message_bytes < 0:
            taken = self._fill(self._length_word, view)
            if len(self._length_word) < _WORD.size:
                return taken
            self._start_message(_WORD.unpack(self._length_word)[0])
        else:
            taken = min(view.nbytes, self._message_bytes - len(self._body))
            self._body += view[:taken]
            self.spent_bytes += taken
        if len(self._body) == self._message_bytes:
            events.append(Message(self._body))
            self._body, self._message_bytes = bytearray(), -1
        return taken

    def _start_message(self, num_bytes: int) -> None:
        if num_bytes > self._max_message_bytes:
            raise FrameTooLargeError(num_bytes, self._max_message_bytes)
        self._length_word.clear()
        self._message_bytes = num_bytes
        self.spent_bytes += MESSAGE_OVERHEAD_BYTES

    @staticmethod
    def _fill(word: bytearray, view: memoryview) -> int:
        taken = min(_WORD.size - len(word), view.nbytes)
        word += view[:taken]
        return taken


def cost_bytes(message: Buffer) -> int:
    """Return the credit that a whole message takes."""
    return memoryview(message).nbytes + MESSAGE_OVERHEAD_BYTES


class Window:
    """The receiver's account: how much credit to give back, and when."""

    def __init__(self, window_bytes: int = WINDOW_BYTES) -> None:
        assert window_bytes >= INITIAL_CREDIT_BYTES
        self._window_bytes = window_bytes
        self._granted_bytes = INITIAL_CREDIT_BYTES
        self._spent_bytes = 0
        self._delivered_bytes = 0

    def spend(self, total_bytes: int) -> None:
        """Note that the peer has spent `total_bytes` in all. Raises: ProtocolError if too much."""
        if total_bytes > self._granted_bytes:
            raise ProtocolError(f"{total_bytes} bytes sent, {self._granted_bytes} granted")
        self._spent_bytes = total_bytes

    @property
    def is_used(self) -> bool:
        """Whether so much has come that a wider window may be of use."""
        return self._spent_bytes >= INITIAL_CREDIT_BYTES // 2

    def widen(self) -> None:
        """Let WINDOW_BYTES wait from now on."""
        self._window_bytes = WINDOW_BYTES

    def deliver(self, num_bytes: int) -> None:
        """Note that a message of this cost has left the queue."""
        self._delivered_bytes += num_bytes

    def grant(self, *, is_reader_waiting: bool) -> int:
        """Return the credit to send now, 0 while it is not worth a record.

        A waiting reader has taken all that came, so even a message larger than the window flows.
        """
        taken_bytes = self._spent_bytes if is_reader_waiting else self._delivered_bytes
        num_bytes = taken_bytes + self._window_bytes - self._granted_bytes
        if num_bytes < self._window_bytes // 4:
            return 0
        self._granted_bytes += num_bytes
        return num_bytes
