"""The trio half of a libp2p stream: reads always, writes as credit allows.

`Inbox` is where the two threads meet: the trio side fills it, the asyncio side empties it.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.stream_muxer.exceptions import MuxedStreamEOF

from swarmnode.errors import PeerError, PeerLostError, ProtocolError
from swarmnode.p2p import framing
from swarmnode.p2p.framing import Kind
from swarmnode.p2p.ports import EndOfStream, Urgency
from swarmnode.p2p.turns import YIELD_RATIO, Turn, Turns

_log = logging.getLogger(__name__)
_MUXER_SLACK_BYTES = 1 << 20
_READ_BYTES = 64 << 10
"""Most bytes decoded before other tasks have their turn: 16 Ki records, or one frame of ours."""
_CLOSE_TIMEOUT_S = 30.0


class Inbox:
    """Messages that wait for their reader, and how the stream ended. Safe from two threads.

    `places` are those of the connection. A stream that uses its window takes one, if there is one,
    and has WINDOW_BYTES from then on; the window of all others is of INITIAL_CREDIT_BYTES.
    """

    def __init__(self, wake_reader: Callable[[], None], places: threading.Semaphore) -> None:
        self._wake_reader = wake_reader
        self._places = places
        self._lock = threading.Lock()
        self._messages: deque[bytearray] = deque()
        self._window = framing.Window(framing.INITIAL_CREDIT_BYTES)
        self._has_place = False
        self._is_dropped = False
        self._is_reader_waiting = False
        self._end: Exception | None = None

    def put(self, messages: list[bytearray], spent_bytes: int) -> int:
        """Add what has arrived; return the credit to send. Raises: ProtocolError on an overrun."""
        with self._lock:
            self._window.spend(spent_bytes)
            if self._is_dropped or self._end is not None:
                return 0
            self._messages += messages
            is_waiting = self._is_reader_waiting
            if messages:
                self._wake()
            return self._grant(is_reader_waiting=is_waiting and not messages)

    def end(self, error: Exception) -> None:
        """Let the reader find `error` after the last message. The first end is the one it sees."""
        with self._lock:
            if self._end is None:
                self._end = error
            self._give_place_back()
            self._wake()

    def drop(self) -> None:
        """Forget what waits and what comes: the reader has done with the stream."""
        with self._lock:
            self._is_dropped = True
            self._messages.clear()
            self._give_place_back()

    def take(self) -> tuple[bytearray | None, int]:
        """Return the next message, or None if there is none yet, and the credit to send.

        Raises: how the stream ended, once it is empty.
        """
        with self._lock:
            if not self._messages:
                if self._end is not None:
                    raise self._end
                self._is_reader_waiting = True
                return None, self._grant(is_reader_waiting=True)
            message = self._messages.popleft()
            self._window.deliver(framing.cost_bytes(message))
            self._give_place_back()
            return message, self._grant(is_reader_waiting=False)

    def stop_waiting(self) -> None:
        """Note that the reader has gone away without a message."""
        with self._lock:
            self._is_reader_waiting = False

    def _grant(self, *, is_reader_waiting: bool) -> int:
        wants_place = self._window.is_used and not self._has_place and self._end is None
        if wants_place and self._places.acquire(blocking=False):
            self._has_place = True
            self._window.widen()
        return self._window.grant(is_reader_waiting=is_reader_waiting)

    def _give_place_back(self) -> None:
        """Let another stream have the place once nothing waits here and nothing comes."""
        if self._has_place and self._end is not None and not self._messages:
            self._has_place = False
            self._places.release()

    def _wake(self) -> None:
        if self._is_reader_waiting:
            self._is_reader_waiting = False
            self._wake_reader()


class NetStream(Protocol):
    """What we use of py-libp2p's stream."""

    muxed_stream: Any

    async def close(self) -> None: ...

    async def reset(self) -> None: ...


class Channel:
    """One stream. Every method but the constructor runs on the trio side."""

    def __init__(
        self,
        stream: NetStream,
        peer: str,
        inbox: Inbox,
        max_message_bytes: int,
        turns: Turns,
        urgency: Urgency,
    ) -> None:
        self.peer = peer
        self.sent_bytes = 0
        """Read from other threads too."""
        self._turns = turns
        self._urgency = urgency
        self._stream = stream
        self._muxed = stream.muxed_stream
        self._raw = self._muxed.conn.secured_conn.raw
        self._inbox = inbox
        self._decoder = framing.Decoder(max_message_bytes)
        self._credit_bytes = framing.INITIAL_CREDIT_BYTES
        self._changed = trio.Event()
        self._write_lock = trio.Lock()
        self._broken: str | None = None
        self._is_ended_by_us = False
        self._is_ended_by_peer = False
        self._closed = trio.Event()

    async def run(self) -> None:
        """Read until the stream ends, whether or not anybody wants its messages. Never raises."""
        error: Exception
        try:
            await self._widen_muxer_window()
            await self._read()
            error = PeerLostError(self.peer, "the stream is closed")
        except (BaseLibp2pError, trio.BrokenResourceError, trio.ClosedResourceError) as caught:
            error = PeerLostError(self.peer, f"stream broke: {caught or type(caught).__name__}")
            error.__cause__ = caught
        except PeerError as caught:
            error = caught
        except Exception as caught:
            _log.exception("a stream with %s failed", self.peer)
            error = PeerLostError(self.peer, f"stream failed: {type(caught).__name__}")
        except trio.Cancelled:
            self._break(PeerLostError(self.peer, "the transport has stopped"))
            raise
        self._break(error)
        await self._dispose()

    async def send(self, parts: tuple[Any, ...]) -> None:
        """Send one message. Cancelled before its first write: withdrawn; before its end: reset.

        Raises: PeerLostError.
        """
        message, is_written = framing.Outgoing(parts), False
        try:
            with self._turns.taking(self._urgency) as turn:
                while not message.is_done:
                    await self._send_record(message, turn)
                is_written = True
                await self._raw.wait_left()
        except trio.Cancelled:
            if message.is_started and not is_written:  # of a record, too, a part may have left
                await self.reset()
            raise

    async def _send_record(self, message: framing.Outgoing, turn: Turn) -> None:
        """Send the next record in its turn, or wait for credit."""
        await self._raw.wait_writable()
        await turn.wait(YIELD_RATIO * self._raw.record_s)
        self._check()
        async with self._write_lock:
            most_bytes = self._raw.record_bytes
            record, cost_bytes = message.record(self._credit_bytes, most_bytes)
            self._credit_bytes -= cost_bytes
            if record:
                await self._write(record)
                self.sent_bytes += len(record)
                turn.moved()
        if not record:
            await self._changed.wait()

    async def grant(self, num_bytes: int) -> None:
        """Let the peer send `num_bytes` more. Never raises: a break shows in `run`."""
        if num_bytes:
            await self._write_control(Kind.CREDIT, num_bytes)

    async def close_write(self) -> None:
        """Tell the peer that no message follows. Idempotent; `run` reports a break."""
        if not self._is_ended_by_us:
            self._is_ended_by_us = True
            await self._write_control(Kind.END)
            await self._close_if_done()

    async def leave(self) -> None:
        """Close both ways, once the peer has what we sent; reset if that takes too long."""
        await self.close_write()
        if self._is_ended_by_peer:
            return
        await self._write_control(Kind.BYE)
        with trio.move_on_after(_CLOSE_TIMEOUT_S):
            await self._closed.wait()
            return
        await self.reset()

    async def reset(self) -> None:
        """Drop the stream at once, both ways."""
        self._break(PeerLostError(self.peer, "the stream was reset here"))
        await self._dispose()

    async def _read(self) -> None:
        consumed_bytes = 0
        while True:
            try:
                chunk = await self._muxed.conn.read_stream(self._muxed.stream_id, _READ_BYTES)
            except MuxedStreamEOF:
                if self._is_ended_by_peer:
                    return
                raise
            events = self._decoder.feed(chunk)
            messages = [event.body for event in events if isinstance(event, framing.Message)]
            credit_bytes = self._inbox.put(messages, self._decoder.spent_bytes)
            consumed_bytes += len(chunk)
            if consumed_bytes >= framing.WINDOW_BYTES // 4:
                await self._release_muxer_window(consumed_bytes)
                consumed_bytes = 0
            await self.grant(credit_bytes)
            for event in events:
                match event:
                    case framing.Credit(num_bytes):
                        self._take_credit(num_bytes)
                    case framing.End() | framing.Bye():
                        self._is_ended_by_peer = True
                        self._inbox.end(EndOfStream())
                        await self._close_if_done()
                if isinstance(event, framing.Bye):
                    return

    def _take_credit(self, num_bytes: int) -> None:
        self._credit_bytes += num_bytes
        if self._credit_bytes > framing.WINDOW_BYTES:
            raise ProtocolError(f"credit for {self._credit_bytes} bytes is more than a window")
        self._signal()

    async def _write(self, record: bytes) -> None:
        """Write under the lock. Our credit is the smaller window, so the muxer's never closes."""
        try:
            await self._muxed.write(memoryview(record))
        except (BaseLibp2pError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            lost = PeerLostError(self.peer, f"cannot write: {error or type(error).__name__}")
            self._break(lost)
            raise lost from error

    async def _write_control(self, kind: Kind, value: int = 0) -> None:
        with suppress(PeerLostError):
            async with self._write_lock:
                self._check()  # here: whoever had the lock may have left a torn record
                await self._write(framing.encode_control(kind, value))

    async def _close_if_done(self) -> None:
        if self._is_ended_by_us and self._is_ended_by_peer:
            with suppress(BaseLibp2pError):
                await self._stream.close()

    async def _widen_muxer_window(self) -> None:
        """Give the peer at once more of the muxer's window than our credit will ever use."""
        target_bytes = framing.WINDOW_BYTES + _MUXER_SLACK_BYTES
        extra_bytes = target_bytes - self._muxed.recv_window
        self._muxed.target_recv_window = target_bytes
        await self._release_muxer_window(extra_bytes)

    async def _release_muxer_window(self, num_bytes: int) -> None:
        self._muxed.recv_window += num_bytes
        await self._muxed.send_window_update(num_bytes)

    def _check(self) -> None:
        if self._broken is not None:
            raise PeerLostError(self.peer, self._broken)

    def _break(self, error: Exception) -> None:
        if self._broken is None:
            self._broken = error.reason if isinstance(error, PeerLostError) else str(error)
            self._inbox.end(error)
            self._signal()
            self._closed.set()

    def _signal(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _dispose(self) -> None:
        with trio.CancelScope(shield=True), trio.move_on_after(1.0):
            await self._stream.reset()
