"""Framed messages on a socketpair between a parent and its child: `u32 length, big endian | bytes`.

The length is checked before anything is allocated, and large messages are read straight into place.
A child picks its end up with `ChildPipe.inherit()` (blocking, thread-safe) or `Pipe.inherit()`
(asyncio), and ends when it reads end of file.
"""

import asyncio
import contextlib
import os
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence

from swarmnode.errors import ChildError, FrameTooLargeError

Buffer = bytes | bytearray | memoryview

MAX_MESSAGE_BYTES = 256 << 20
"""Largest message accepted from the other end of a pipe, unless the pipe is told otherwise."""
FD_VARIABLE = "SWARMNODE_PIPE_FD"
PARENT_VARIABLE = "SWARMNODE_PARENT_PID"
_LENGTH = struct.Struct(">I")
_SOCKET_BUFFER_BYTES = 4 << 20
_FAIR_SHARE_BYTES = 8 << 20
"""Bytes moved before other tasks of the loop get a turn."""
_MAX_PARTS = 64
"""Buffers handed to one sendmsg; the system's own limit is 1024 or more."""


class Pipe:
    """The asyncio end of a socketpair. A cancelled call never damages the order of bytes."""

    def __init__(self, sock: socket.socket, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        sock.setblocking(False)
        _enlarge(sock)
        self._sock = sock
        self._max_message_bytes = max_message_bytes
        self._sending = asyncio.Lock()
        self._receiving = asyncio.Lock()
        self._outgoing: deque[memoryview] = deque()
        self._header = bytearray(_LENGTH.size)
        self._body: bytearray | None = None
        self._filled = 0
        self._waiting: set[asyncio.Event] = set()

    @classmethod
    def inherit(cls, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> "Pipe":
        """Take over the end that the parent passed on. Raises: ChildError if there is none."""
        return cls(_inherited_socket(), max_message_bytes=max_message_bytes)

    async def send(self, *parts: Buffer) -> None:
        """Send the concatenation of `parts` as one message; waits while the other end is slow.

        The buffers must not change before this returns. If the call is cancelled half-way, the
        next one sends the rest first. Raises: BrokenPipeError or ConnectionResetError.
        """
        async with self._sending:
            self._outgoing.extend(_framed(parts))
            sent_bytes = 0
            while self._outgoing:
                try:
                    num_bytes = self._sock.sendmsg(_head(self._outgoing))
                except BlockingIOError:
                    await self._until(writable=True)
                    continue
                _advance(self._outgoing, num_bytes)
                sent_bytes += num_bytes
                if sent_bytes >= _FAIR_SHARE_BYTES:
                    sent_bytes = 0
                    await asyncio.sleep(0)

    async def receive(self) -> bytearray:
        """Return the next message.

        Raises: EOFError at the end (also in the middle of a message), FrameTooLargeError; after
        that one nothing can be received any more.
        """
        async with self._receiving:
            if self._body is None:
                await self._fill(self._header)
                num_bytes = _checked_length(self._header, self._max_message_bytes)
                self._body, self._filled = bytearray(num_bytes), 0
            await self._fill(self._body)
            body, self._body, self._filled = self._body, None, 0
            return body

    async def _fill(self, target: bytearray) -> None:
        view = memoryview(target)
        fair_bytes = self._filled + _FAIR_SHARE_BYTES
        while self._filled < len(target):
            try:
                num_bytes = self._sock.recv_into(view[self._filled :])
            except BlockingIOError:
                await self._until(writable=False)
                continue
            except ConnectionResetError:
                num_bytes = 0
            if num_bytes == 0:
                raise EOFError("pipe closed")
            self._filled += num_bytes
            if self._filled >= fair_bytes:
                fair_bytes += _FAIR_SHARE_BYTES
                await asyncio.sleep(0)

    async def _until(self, *, writable: bool) -> None:
        """Wait for readiness only; the bytes move outside, where no cancellation can lose them."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        add = loop.add_writer if writable else loop.add_reader
        remove = loop.remove_writer if writable else loop.remove_reader
        if self._sock.fileno() < 0:
            raise EOFError("pipe closed")
        add(self._sock, ready.set)
        self._waiting.add(ready)
        try:
            await ready.wait()
        finally:
            self._waiting.discard(ready)
            if self._sock.fileno() >= 0:
                remove(self._sock)

    def close_write(self) -> None:
        """The other end reads to end of file; this end can still receive."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close this end; calls that wait on it end with EOFError or OSError. Idempotent."""
        if self._waiting:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._sock)
            loop.remove_writer(self._sock)
            for ready in self._waiting:
                ready.set()
        self._sock.close()


class ChildPipe:
    """The blocking end of a socketpair, for a child that computes."""

    def __init__(self, sock: socket.socket, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        sock.setblocking(True)
        _enlarge(sock)
        self._sock = sock
        self._max_message_bytes = max_message_bytes
        self._sending = threading.Lock()
        self._receiving = threading.Lock()

    @classmethod
    def inherit(cls, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> "ChildPipe":
        """Take over the end that the parent passed on. Raises: ChildError if there is none."""
        return cls(_inherited_socket(), max_message_bytes=max_message_bytes)

    def send(self, *parts: Buffer) -> None:
        """Send the concatenation of `parts` as one message; may be called from any thread.

        Raises: BrokenPipeError or ConnectionResetError when the parent is gone.
        """
        with self._sending:
            outgoing = deque(_framed(parts))
            while outgoing:
                _advance(outgoing, self._sock.sendmsg(_head(outgoing)))

    def receive(self) -> bytearray:
        """Return the next message. Raises: EOFError when the parent is gone, FrameTooLargeError."""
        with self._receiving:
            header = bytearray(_LENGTH.size)
            self._fill(header)
            body = bytearray(_checked_length(header, self._max_message_bytes))
            self._fill(body)
            return body

    def _fill(self, target: bytearray) -> None:
        view = memoryview(target)
        while view:
            try:
                num_bytes = self._sock.recv_into(view)
            except ConnectionResetError:
                num_bytes = 0
            if num_bytes == 0:
                raise EOFError("the parent closed the pipe")
            view = view[num_bytes:]

    def close(self) -> None:
        self._sock.close()


def _inherited_socket() -> socket.socket:
    fd = os.environ.pop(FD_VARIABLE, None)
    parent_pid = os.environ.pop(PARENT_VARIABLE, None)
    if fd is None or parent_pid is None:
        raise ChildError("no pipe to a parent: this module is started by the daemon")
    if sys.platform != "linux":
        threading.Thread(target=_watch_parent, args=(int(parent_pid),), daemon=True).start()
    sock = socket.socket(fileno=int(fd))
    sock.set_inheritable(False)
    return sock


def _watch_parent(parent_pid: int) -> None:
    """End this process when its parent is gone, where the kernel does not do it for us."""
    while os.getppid() == parent_pid:
        time.sleep(0.5)
    os._exit(1)


def _framed(parts: Sequence[Buffer]) -> list[memoryview]:
    views = [memoryview(part).cast("B") for part in parts if len(part)]
    num_bytes = sum(len(view) for view in views)
    assert num_bytes < 1 << 32, "a message is shorter than 4 GiB"
    return [memoryview(_LENGTH.pack(num_bytes)), *views]


def _head(outgoing: deque[memoryview]) -> list[memoryview]:
    return [outgoing[index] for index in range(min(len(outgoing), _MAX_PARTS))]


def _advance(outgoing: deque[memoryview], num_bytes: int) -> None:
    while outgoing and num_bytes >= len(outgoing[0]):
        num_bytes -= len(outgoing.popleft())
    if num_bytes:
        outgoing[0] = outgoing[0][num_bytes:]


def _checked_length(header: bytearray, max_bytes: int) -> int:
    (num_bytes,) = _LENGTH.unpack(header)
    if num_bytes > max_bytes:
        raise FrameTooLargeError(num_bytes, max_bytes)
    return int(num_bytes)


def _enlarge(sock: socket.socket) -> None:
    """Larger buffers mean fewer switches between the two processes; the system may cap them."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
