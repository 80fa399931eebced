"""What others may take of a host: places for connections that they begin, memory of each.

py-libp2p keeps the place of a connection until the whole host ends, lets handshakes that nobody
finishes take all places there are, and only notes that a peer sends more than it may.
"""

import math
import threading
from typing import Any

import trio
from libp2p.io.exceptions import MessageTooLarge
from libp2p.network.exceptions import SwarmException

from swarmnode.p2p.buffered import READ_BYTES

MAX_INBOUND = 250
"""Connections that others began and that may be open at once; of 300 in all."""
MAX_HANDSHAKES = 128
"""Handshakes that may be under way at once; the oldest makes room for one more."""
MAX_UNREAD_BYTES = 64 << 20
"""Bytes of one connection's streams that may wait to be decoded; some 4 largest windows."""
MAX_WIDE_STREAMS = 16
"""Streams of one connection of which WINDOW_BYTES may wait for a reader; of each other one only
INITIAL_CREDIT_BYTES."""
MAX_LINE_BYTES = 64 << 10
"""Longest message of the negotiation of a protocol."""


def refuse_long_reads(reader: Any, max_bytes: int) -> None:
    """Let reads of more than `max_bytes` raise MessageTooLarge, before the first byte."""
    read = reader.read

    async def read_bounded(num_bytes: int | None = None) -> Any:
        if num_bytes is not None and num_bytes > max_bytes:
            raise MessageTooLarge(f"{num_bytes} bytes are announced")
        return await read(num_bytes)

    reader.read = read_bounded


class _OverrunError(trio.TooSlowError):
    """py-libp2p's muxer hangs up on this error, as on no other, wherever its reader is."""


def bound_unread(network: Any) -> None:
    """From now on hang up on a peer that has more than MAX_UNREAD_BYTES undecoded, and give each
    connection MAX_WIDE_STREAMS `wide_places`."""
    upgrade = network.upgrader.upgrade_connection

    async def upgrade_bounded(connection: Any, peer: Any) -> Any:
        muxed = await upgrade(connection, peer)
        read = muxed._read_data_body

        async def read_bounded(num_bytes: int) -> Any:
            if num_bytes + sum(map(len, muxed.stream_buffers.values())) > MAX_UNREAD_BYTES:
                raise _OverrunError
            return await read(num_bytes)

        muxed._read_data_body = read_bounded
        muxed.wide_places = threading.BoundedSemaphore(MAX_WIDE_STREAMS)
        return muxed

    network.upgrader.upgrade_connection = upgrade_bounded


class Inbound:
    """Takes the connections that others begin to `network`, from then on."""

    def __init__(self, network: Any) -> None:
        network._inbound_limiter.total_tokens = math.inf
        self._upgrade = network.upgrade_inbound_raw_conn
        network.upgrade_inbound_raw_conn = self._take
        self._handshakes: dict[trio.CancelScope, None] = {}
        self._num_open = 0

    async def _take(self, raw: Any, address: Any) -> None:
        """Secure a connection and stay with it until it ends. Raises: SwarmException, always."""
        refuse_long_reads(raw, READ_BYTES)
        connection = await self._shake_hands(raw, address)
        self._num_open += 1
        try:
            if self._num_open > MAX_INBOUND:
                await connection.close()
            await connection.event_closed.wait()
        finally:
            self._num_open -= 1
        raise SwarmException("the connection has ended")  # or py-libp2p would wait for the host

    async def _shake_hands(self, raw: Any, address: Any) -> Any:
        if len(self._handshakes) >= MAX_HANDSHAKES:
            oldest = next(iter(self._handshakes))
            del self._handshakes[oldest]
            oldest.cancel()
        with trio.CancelScope() as scope:
            self._handshakes[scope] = None
            try:
                return await self._upgrade(raw, address)
            finally:
                self._handshakes.pop(scope, None)
        raise SwarmException("others came later, and this handshake is not finished")
