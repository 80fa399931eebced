"""A peer in a process of its own, for tests that kill it: prints where it is, then holds streams.

/echo/1 answers every message; /hold/1 never reads.
"""

import asyncio
import json
import sys

from swarmnode.p2p.ports import Stream
from swarmnode.p2p.streams import Libp2pTransport

MAX_MESSAGE_BYTES = 128 << 20


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive())


async def hold(stream: Stream) -> None:
    await asyncio.Event().wait()


async def main() -> None:
    async with Libp2pTransport.start(b"v" * 32, ["/ip4/127.0.0.1/tcp/0"]) as transport:
        transport.serve("/echo/1", echo, max_message_bytes=MAX_MESSAGE_BYTES)
        transport.serve("/hold/1", hold, max_message_bytes=MAX_MESSAGE_BYTES)
        print(json.dumps({"peer": transport.peer, "addresses": transport.addresses}), flush=True)
        await asyncio.to_thread(sys.stdin.read)  # ends with the test's process, at the latest


if __name__ == "__main__":
    asyncio.run(main())
