"""Who may come in: places for connections that others begin, in py-libp2p's place.

py-libp2p keeps the place of a connection until the whole host ends, and lets handshakes that
nobody finishes take all places there are.
"""

import math
from typing import Any

import trio
from libp2p.network.exceptions import SwarmException

MAX_INBOUND = 250
"""Connections that others began and that may be open at once; of 300 in all."""
MAX_HANDSHAKES = 128
"""Handshakes that may be under way at once; the oldest makes room for one more."""


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
