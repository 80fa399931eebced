"""Short probes of the links on which nothing flows, and the loop that decides whom to probe.

Protocol `/swarmnode/probe/1`; every message is one msgpack list. The prober speaks first:
    ["ping", rate]  -> ["pong", coordinate, rate]      rate: see `LinkTable.hear`, 0 if unknown
    ["burst", size] -> ["go"]                          when the responder has time for it
    pieces of PIECE_BYTES, `size` bytes in all -> ["got", bytes, seconds]
A burst is timed where it arrives: what was written may still wait in some buffer.
"""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from swarmnode.domain import Coordinate, PeerId
from swarmnode.errors import PeerLostError, ProtocolError
from swarmnode.p2p.links import LinkTable
from swarmnode.p2p.ports import EndOfStream, Stream, Transport
from swarmnode.wire import PROBE_PROTOCOL

PIECE_BYTES = 32 << 10
"""Also the largest message of the protocol: all that a stranger can make us allocate."""
MAX_BURST_BYTES = 1 << 20
FIRST_BURST_BYTES = 64 << 10
"""On a slow line this is already enough; on others four times as much follows."""
WANTED_S = 0.3
"""A burst that takes this long, besides two round trips, says enough."""
NUM_PINGS = 4
MAX_PINGS = 16
MAX_BURSTS = 4
MAX_PROBES = 4
"""Probes that a responder serves at once; more are turned away."""
PAUSE_S = 5.0
"""Between two probes of one peer."""
TIMEOUT_S = 20.0
MAX_REMEMBERED = 4096

Clock = Callable[[], float]


# ---- responding --------------------------------------------------------------------------------


class Responder:
    """Answers probes: few at once, rarely the same peer, never more bytes than a burst has."""

    def __init__(
        self,
        transport: Transport,
        table: LinkTable,
        coordinate: Callable[[], Coordinate],
        on_dropped: Callable[[str], None] = lambda _: None,
        clock: Clock = time.monotonic,
    ) -> None:
        """`clock` is the one of `table`; an event loop's own may only count milliseconds."""
        self._table = table
        self._coordinate = coordinate
        self._on_dropped = on_dropped
        self._clock = clock
        self._num_probes = 0
        self._last_s: OrderedDict[PeerId, float] = OrderedDict()
        self._burst_lock = asyncio.Lock()
        transport.serve(PROBE_PROTOCOL, self._accept, max_message_bytes=PIECE_BYTES)

    async def _accept(self, stream: Stream) -> None:
        """Serve one probe; a peer that comes too often finds the stream closed."""
        if not self._admit(stream.peer):
            self._on_dropped("refused_probe")
            return
        self._num_probes += 1
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._serve(stream)
        except (EndOfStream, TimeoutError):
            pass
        except ProtocolError:
            self._on_dropped("bad_probe")
            raise
        finally:
            self._num_probes -= 1

    def _admit(self, peer: PeerId) -> bool:
        now_s = self._clock()
        if self._num_probes >= MAX_PROBES or now_s < self._last_s.get(peer, -math.inf) + PAUSE_S:
            return False
        self._last_s[peer] = now_s
        self._last_s.move_to_end(peer)
        while len(self._last_s) > MAX_REMEMBERED:
            self._last_s.popitem(last=False)
        return True

    async def _serve(self, stream: Stream) -> None:
        num_pings = num_bursts = 0
        while True:
            match _unpack(await stream.receive()):
                case ["ping", float(rate)] if num_pings < MAX_PINGS:
                    num_pings += 1
                    self._table.hear(stream.peer, rate, self._clock())
                    told = self._table.transfers_received(stream.peer, self._clock()) or 0.0
                    await stream.send(_pack("pong", [*self._coordinate()], told))
                case ["burst", int(size)] if num_bursts < MAX_BURSTS and _is_burst(size):
                    num_bursts += 1
                    async with self._burst_lock:  # two at once would measure each other
                        await stream.send(_pack("go"))
                        timed_bytes, seconds = await _time_burst(stream, size, self._clock)
                    self._table.observe_transfer(
                        stream.peer, timed_bytes, seconds, self._clock(), source="probe"
                    )
                    await stream.send(_pack("got", timed_bytes, seconds))
                case _:
                    raise ProtocolError("not a probe, or too much of one")


async def _time_burst(stream: Stream, size: int, clock: Clock) -> tuple[int, float]:
    """Receive `size` bytes; how many of them arrived in how many seconds, where it went well.

    Of all halves of the burst the one at the upper quartile counts: a connection that was idle
    starts slowly, and after a pause of this process pieces seem to come at once. The first piece
    only starts the clock.
    """
    arrivals: list[tuple[int, float]] = []
    total = 0
    while total < size:
        piece = await stream.receive()
        if not 0 < len(piece) <= size - total:
            raise ProtocolError(f"a piece of {len(piece)} bytes does not fit the burst")
        total += len(piece)
        arrivals.append((total, clock()))
    span = max(1, (len(arrivals) - 1) // 2)
    halves = sorted(
        ((b - a, t - s) for (a, s), (b, t) in zip(arrivals, arrivals[span:], strict=False)),
        key=lambda half: half[0] / max(half[1], 1e-9),
    )
    return halves[3 * (len(halves) - 1) // 4] if halves else (0, 0.0)


# ---- probing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """What one visit to a peer has shown."""

    rtt_s: float
    coordinate: Coordinate


async def probe(
    transport: Transport,
    peer: PeerId,
    addresses: Sequence[str],
    table: LinkTable,
    *,
    with_burst: bool,
    clock: Clock = time.monotonic,
) -> Probe | None:
    """Measure the link to `peer` into `table`; None if it turned us away, left or broke a rule.

    Raises: PeerError if it cannot be reached or does not speak the protocol.
    """
    stream = await transport.open(peer, addresses, PROBE_PROTOCOL, max_message_bytes=PIECE_BYTES)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            found = await _ping(stream, table, clock)
            if with_burst:
                await _burst(stream, table, found.rtt_s, clock)
            return found
    except (EndOfStream, TimeoutError, PeerLostError, ProtocolError):
        return None
    finally:
        await stream.reset()


async def _ping(stream: Stream, table: LinkTable, clock: Clock) -> Probe:
    peer, best_s, place, rate = stream.peer, math.inf, Coordinate(), 0.0
    for _ in range(NUM_PINGS):
        told = table.transfers_received(peer, clock()) or 0.0
        sent_s = clock()
        await stream.send(_pack("ping", told))
        match _unpack(await stream.receive()):
            case ["pong", [*values], float(rate)] if _are_floats(values, 5):
                best_s, place = min(best_s, clock() - sent_s), Coordinate(*values)
            case _:
                raise ProtocolError("not the answer to a ping")
    table.observe_round_trip(peer, best_s, clock())
    table.hear(peer, rate, clock())
    return Probe(best_s, place)


async def _burst(stream: Stream, table: LinkTable, rtt_s: float, clock: Clock) -> None:
    """Send ever larger bursts until one took long enough to believe it."""
    size, timed_bytes, seconds = FIRST_BURST_BYTES, 0, 0.0
    for _ in range(MAX_BURSTS):
        await stream.send(_pack("burst", size))
        if _unpack(await stream.receive()) != ["go"]:
            raise ProtocolError("not the answer to a burst")
        began_s = clock()
        for start in range(0, size, PIECE_BYTES):
            await stream.send(bytes(min(PIECE_BYTES, size - start)))
        match _unpack(await stream.receive()):
            case ["got", int(timed_bytes), float(seconds)] if 0 <= timed_bytes <= size:
                took_s = clock() - began_s
            case _:
                raise ProtocolError("not the result of a burst")
        # What fits into a round trip: a long and fast link needs a second burst to speed up.
        flight_bytes = rtt_s * timed_bytes / max(seconds, 1e-6)
        is_full = size >= MAX_BURST_BYTES and flight_bytes < MAX_BURST_BYTES / 4
        if is_full or took_s >= WANTED_S + 2 * rtt_s:
            break
        size = min(MAX_BURST_BYTES, 4 * size)
    table.observe_transfer(
        stream.peer, timed_bytes, seconds, clock(), direction="sent", source="probe"
    )


def _is_burst(size: int) -> bool:
    return type(size) is int and 0 < size <= MAX_BURST_BYTES


def _are_floats(values: list[Any], count: int) -> bool:
    return len(values) == count and all(type(value) is float for value in values)


def _pack(*fields: Any) -> bytes:
    return bytes(msgpack.packb(fields))


def _unpack(message: bytes | bytearray) -> Any:
    try:
        return msgpack.unpackb(message, max_ext_len=0) if len(message) <= 256 else None
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(f"not msgpack: {error}") from None
