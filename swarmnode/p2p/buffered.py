"""Noise over a buffered raw connection: what makes py-libp2p fast, and safe under load both ways.

py-libp2p reads each Noise frame in small pieces and writes it under the muxer's lock. Here reads
take what the socket has, and writes go to a queue that a task of its own sends. So the muxer's
reader, which must answer pings, never waits for a socket that the peer will only drain once its
own reader has answered ours. Back-pressure is `wait_writable`, asked outside the muxer's lock.
"""

import socket
import struct
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import trio
from libp2p.abc import IRawConnection, ISecureConn, ISecureTransport
from libp2p.crypto.ed25519 import create_new_key_pair as create_ed25519
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519
from libp2p.io.exceptions import ConnectionClosedError, MessageTooLarge
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.security.noise.io import MAX_PLAINTEXT_LENGTH
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_PROTOCOL_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.security.secure_session import SecureSession
from libp2p.stream_muxer.yamux.yamux import MAX_WINDOW_SIZE

READ_BYTES = 1 << 20
"""Most bytes taken from the socket at once."""
QUEUE_BYTES = 1 << 20
"""Bytes in the write queue above which senders of data wait, on a fast line."""
FAST_BYTES_PER_S = 12.5e6
"""On slower lines the queue is no longer than QUEUE_S: what is in it cannot be overtaken."""
QUEUE_S = 0.005
LEAST_BYTES = 16 << 10
_LOOK_S = 0.1
_NUM_RATES = 8
_DELIVERY_RATE = struct.Struct("=160xQ")
"""Where Linux' tcp_info has the rate at which the peer has lately acknowledged bytes."""
DEAD_AFTER_S = 20.0
"""A connection breaks when the peer's kernel acknowledges nothing for so long."""
_CLOSE_TIMEOUT_S = 0.5
_SIZE_BYTES = 2

Spawn = Callable[..., object]
"""Starts a task that must not raise: the nursery's `start_soon`."""

__all__ = ["NOISE_PROTOCOL_ID", "BufferedNoise", "BufferedSession", "key_pair_from_seed"]


def key_pair_from_seed(seed: bytes) -> KeyPair:
    """Return the Ed25519 key pair of a 32-byte seed."""
    assert len(seed) == 32
    return create_ed25519(seed)


class Pace:
    """How fast a line is, and how much to queue for it: what is queued nothing can overtake."""

    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=_NUM_RATES)
        self.bytes_per_s = FAST_BYTES_PER_S
        self.queue_bytes = QUEUE_BYTES

    def observe(self, bytes_per_s: float) -> bool:
        """Note a rate, 0 if it is not known; whether `queue_bytes` has changed.

        The fastest of the last few counts: a shared line, or a late wake-up, is no slow line.
        """
        if bytes_per_s <= 0.0:
            return False
        self._rates.append(bytes_per_s)
        self.bytes_per_s = max(self._rates)
        is_fast = self.bytes_per_s >= FAST_BYTES_PER_S
        before = self.queue_bytes
        slow_bytes = max(LEAST_BYTES, int(self.bytes_per_s * QUEUE_S))
        self.queue_bytes = QUEUE_BYTES if is_fast else slow_bytes
        return self.queue_bytes != before


class BufferedConnection(RawConnection):  # type: ignore[misc]
    """A raw connection that reads ahead and writes behind."""

    def __init__(self, inner: RawConnection, spawn: Spawn) -> None:
        super().__init__(inner.stream, inner.is_initiator)
        self._inner = inner
        self._buffer = bytearray()
        self._queue: list[bytes] = []
        self._queued_bytes = 0
        self._put_bytes = 0
        """Since the start."""
        self._pace = Pace()
        self._look_s = 0.0
        self._error: Exception | None = None
        self._wake = trio.Event()
        self._drained = trio.Event()
        _set_dead_peer_timers(inner)
        spawn(self._write_queue)

    async def read(self, n: int | None = None) -> bytes:
        """Return exactly `n` bytes, or fewer at the end of the connection."""
        if n is None:
            n = max(1, len(self._buffer))
        while len(self._buffer) < n:
            chunk = await self._inner.read(max(READ_BYTES, n - len(self._buffer)))
            if not chunk:
                break
            self._buffer += chunk
        with memoryview(self._buffer) as view:
            result = bytes(view[:n])
        del self._buffer[:n]
        return result

    async def write(self, data: bytes) -> None:
        """Queue `data`. Raises: ConnectionClosedError if the connection is broken."""
        if self._error is not None:
            raise ConnectionClosedError(str(self._error), transport="tcp") from self._error
        self._queue.append(data)
        self._queued_bytes += len(data)
        self._put_bytes += len(data)
        self._wake.set()

    async def wait_writable(self) -> None:
        """Wait while the queue is long. Returns at once on a broken connection."""
        while self._queued_bytes > self._pace.queue_bytes and self._error is None:
            await self._drained.wait()

    async def wait_left(self) -> None:
        """On a slow line, wait until the kernel has all that was queued before."""
        if self._pace.queue_bytes < QUEUE_BYTES:
            end_bytes = self._put_bytes
            while self._put_bytes - self._queued_bytes < end_bytes and self._error is None:
                await self._drained.wait()

    @property
    def record_bytes(self) -> int:
        """How much data to queue at once."""
        return self._pace.queue_bytes

    @property
    def record_s(self) -> float:
        """How long that takes on this line."""
        return self._pace.queue_bytes / self._pace.bytes_per_s

    async def close(self) -> None:
        """Send what is queued, if that is quick, and close the socket."""
        with trio.move_on_after(_CLOSE_TIMEOUT_S):
            while self._queued_bytes and self._error is None:
                await self._drained.wait()
        self._fail(ConnectionClosedError("connection closed", transport="tcp"))
        await self._inner.close()

    def abort(self) -> None:
        """Close the socket now, whatever is under way."""
        self._fail(ConnectionClosedError("connection aborted", transport="tcp"))
        self._inner.stream.stream.socket.close()

    @contextmanager
    def broken_on_failure(self) -> Iterator[None]:
        """End the writing task if the block fails: nobody else would."""
        try:
            yield
        except BaseException:
            self._fail(ConnectionClosedError("handshake failed", transport="tcp"))
            raise

    async def _write_queue(self) -> None:
        while self._error is None:
            if not self._queue:
                await self._wake.wait()
                self._wake = trio.Event()
                continue
            data = b"".join(self._queue)
            self._queue.clear()
            try:
                await self._inner.write(data)
            except Exception as error:
                self._fail(error)
                return
            if trio.current_time() >= self._look_s:
                self._look_s = trio.current_time() + _LOOK_S
                self._look_at_rate()
            self._queued_bytes -= len(data)
            self._signal()

    def _look_at_rate(self) -> None:
        """Let neither us nor the kernel queue more than a slow line takes in a moment."""
        sock = self._inner.stream.stream.socket
        with suppress(OSError, AttributeError, struct.error):  # not every system can tell
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _DELIVERY_RATE.size)
            if self._pace.observe(_DELIVERY_RATE.unpack(info)[0]):
                unsent_bytes = self._pace.queue_bytes % QUEUE_BYTES  # 0: as many as there are
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, unsent_bytes)

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
        self._queue.clear()
        self._queued_bytes = 0
        self._wake.set()
        self._signal()

    def _signal(self) -> None:
        self._drained.set()
        self._drained = trio.Event()


class BufferedSession(SecureSession):  # type: ignore[misc]
    """An established Noise session that encrypts a whole write at once."""

    def __init__(self, session: SecureSession, raw: BufferedConnection) -> None:
        super().__init__(
            local_peer=session.local_peer,
            local_private_key=session.local_private_key,
            remote_peer=session.remote_peer,
            remote_permanent_pubkey=session.remote_permanent_pubkey,
            is_initiator=session.is_initiator,
            conn=session.conn,
        )
        self.raw = raw
        self._noise: Any = session.conn.noise_state
        self._plain = bytearray()

    async def read(self, n: int | None = None) -> bytes:
        """Return exactly `n` bytes, or fewer at the end of the connection.

        Raises: MessageTooLarge, before the first byte, for more than the muxer's largest window.
        """
        if n is None:
            n = max(1, len(self._plain))
        if n > MAX_WINDOW_SIZE:
            raise MessageTooLarge(f"{n} bytes are announced")
        while len(self._plain) < n:
            size = await self.raw.read(_SIZE_BYTES)
            frame = await self.raw.read(int.from_bytes(size, "big"))
            if len(size) < _SIZE_BYTES or len(frame) < int.from_bytes(size, "big"):
                break
            self._plain += self._noise.decrypt(frame)
        with memoryview(self._plain) as view:
            result = bytes(view[:n])
        del self._plain[:n]
        return result

    async def write(self, data: bytes) -> None:
        """Encrypt and queue `data`."""
        pieces = []
        for start in range(0, len(data), MAX_PLAINTEXT_LENGTH):
            frame = self._noise.encrypt(bytes(data[start : start + MAX_PLAINTEXT_LENGTH]))
            pieces += [len(frame).to_bytes(_SIZE_BYTES, "big"), frame]
        await self.raw.write(b"".join(pieces))


class BufferedNoise(ISecureTransport):  # type: ignore[misc]
    """py-libp2p's Noise handshake; the session after it is ours."""

    def __init__(self, keys: KeyPair, spawn: Spawn) -> None:
        self._noise = NoiseTransport(keys, noise_privkey=create_x25519().private_key)
        self._spawn = spawn
        self._connections: weakref.WeakSet[BufferedConnection] = weakref.WeakSet()

    def abort_all(self) -> None:
        """Close every socket now: orderly goodbyes take 0.2 s for each connection."""
        for connection in list(self._connections):
            connection.abort()

    def _buffered(self, conn: IRawConnection) -> BufferedConnection:
        self._connections.add(raw := BufferedConnection(conn, self._spawn))
        return raw

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        """Answer a handshake; the session knows the peer whose key signed it."""
        raw = self._buffered(conn)
        with raw.broken_on_failure():
            return BufferedSession(await self._noise.secure_inbound(raw), raw)

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        """Start a handshake. Raises: PeerIDMismatchesPubkey if somebody else answers."""
        raw = self._buffered(conn)
        with raw.broken_on_failure():
            return BufferedSession(await self._noise.secure_outbound(raw, peer_id), raw)


def _set_dead_peer_timers(raw: RawConnection) -> None:
    """Let the kernel break a connection whose peer is gone without a word."""
    sock = raw.stream.stream.socket
    options = [
        (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", int(DEAD_AFTER_S / 4)),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", int(DEAD_AFTER_S / 4)),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", int(DEAD_AFTER_S * 1000)),
    ]
    for level, name, value in options:
        if hasattr(socket, name):  # not every system has every timer
            sock.setsockopt(level, getattr(socket, name), value)
