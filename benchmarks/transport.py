"""How fast the transport is between two processes on loopback, from asyncio to asyncio.

    python benchmarks/transport.py [--num-runs 9] [--num-round-trips 2000]

The limit, measured in the same run: an asyncio TCP stream without encryption. One JSON line.
"""

import argparse
import asyncio
import json
import multiprocessing
import time
from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any

from _environment import environment

from swarmnode.p2p.ports import EndOfStream, Stream
from swarmnode.p2p.streams import Libp2pTransport

MESSAGE_BYTES = 16 << 20
ROUND_TRIP_BYTES = 1 << 10
MAX_BYTES = MESSAGE_BYTES
LISTEN = ["/ip4/127.0.0.1/tcp/0"]


class PlainStream:
    """The same messages over an asyncio TCP stream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, body: bytes) -> None:
        self._writer.write(len(body).to_bytes(4, "big"))
        self._writer.write(body)
        await self._writer.drain()

    async def receive(self) -> bytes:
        size = int.from_bytes(await self._reader.readexactly(4), "big")
        return await self._reader.readexactly(size)


async def answer(stream: Stream | PlainStream) -> None:
    """Echo short messages; answer a long one with its length."""
    try:
        while True:
            body = await stream.receive()
            is_long = len(body) > ROUND_TRIP_BYTES
            await stream.send(len(body).to_bytes(4, "big") if is_long else body)
    except (EndOfStream, asyncio.IncompleteReadError, ConnectionError):
        return


async def serve(ready: Any) -> None:
    """Be the far end of both until the parent ends this process."""

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer(PlainStream(reader, writer))

    server = await asyncio.start_server(plain, "127.0.0.1", 0, limit=4 << 20)
    async with server, Libp2pTransport.start(b"s" * 32, LISTEN) as transport:
        transport.serve("/bench/1", answer, max_message_bytes=MAX_BYTES)
        port = server.sockets[0].getsockname()[1]
        ready.put((port, transport.peer, list(transport.addresses)))
        await asyncio.Event().wait()


def run_server(ready: Any) -> None:
    asyncio.run(serve(ready))


async def timed(action: Callable[[], Awaitable[object]]) -> float:
    started_s = time.perf_counter()
    await action()
    return time.perf_counter() - started_s


async def measure(
    stream: Any, *, num_runs: int, num_round_trips: int
) -> dict[str, dict[str, float]]:
    """Return MB/s of long messages and the round trip of short ones; the first runs warm up."""
    long, short = bytes(MESSAGE_BYTES), bytes(ROUND_TRIP_BYTES)

    async def exchange(body: bytes) -> None:
        await stream.send(body)
        await stream.receive()

    runs_s = [await timed(lambda: exchange(long)) for _ in range(num_runs + 2)][2:]
    trips_s = [await timed(lambda: exchange(short)) for _ in range(num_round_trips + 100)][100:]
    rates = sorted(MESSAGE_BYTES / 1e6 / run_s for run_s in runs_s)
    trips_ms = sorted(trip_s * 1e3 for trip_s in trips_s)
    return {
        "mb_per_s": {"median": median(rates), "min": rates[0], "max": rates[-1]},
        "round_trip_ms": {
            "p50": trips_ms[len(trips_ms) // 2],
            "p99": trips_ms[len(trips_ms) * 99 // 100],
        },
    }


async def run(*, num_runs: int, num_round_trips: int) -> dict[str, object]:
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    process = context.Process(target=run_server, args=(ready,), daemon=True)
    process.start()
    counts = {"num_runs": num_runs, "num_round_trips": num_round_trips}
    try:
        port, peer, addresses = await asyncio.to_thread(ready.get, timeout=60)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4 << 20)
        plain = await measure(PlainStream(reader, writer), **counts)
        writer.close()
        async with Libp2pTransport.start(b"c" * 32, LISTEN) as transport:
            stream = await transport.open(peer, addresses, "/bench/1", max_message_bytes=MAX_BYTES)
            ours = await measure(stream, **counts)
    finally:
        process.terminate()
        process.join()
    share = ours["mb_per_s"]["median"] / plain["mb_per_s"]["median"]
    return {
        **counts,
        "message_bytes": MESSAGE_BYTES,
        "round_trip_bytes": ROUND_TRIP_BYTES,
        "transport": ours,
        "plain_tcp": plain,
        "share_of_plain_tcp": share,
    }


def rounded(value: Any) -> Any:
    """Keep three digits after the point: the rest is noise."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return round(value, 3) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-runs", type=int, default=9)
    parser.add_argument("--num-round-trips", type=int, default=2000)
    args = parser.parse_args()
    figures = asyncio.run(run(num_runs=args.num_runs, num_round_trips=args.num_round_trips))
    versions = environment(["libp2p", "trio", "cryptography"])
    print(json.dumps({"bench": "transport", **rounded(figures), **versions}))


if __name__ == "__main__":
    main()
