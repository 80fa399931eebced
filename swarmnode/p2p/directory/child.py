"""The directory child: answers the daemon's requests until its pipe ends.

Requests and answers are msgpack maps with a number; the first request must be "start".
"""

import asyncio
import os
import sys
import traceback
from contextlib import suppress
from typing import Any

import msgpack

from swarmnode.errors import BusyError, PeerLostError, SwarmError, UserError
from swarmnode.p2p.directory.client import MAX_MESSAGE_BYTES
from swarmnode.p2p.directory.node import Node, start_node
from swarmnode.pipes import Pipe


async def serve(pipe: Pipe) -> None:
    """Run one DHT node for the daemon at the other end; return when the daemon is gone."""
    async with asyncio.TaskGroup() as group:
        await _serve(pipe, group)


async def _serve(pipe: Pipe, group: asyncio.TaskGroup) -> None:
    node: Node | None = None
    watch: asyncio.Task[None] | None = None
    try:
        while True:
            request = msgpack.unpackb(await pipe.receive())
            number = request.pop("number")
            try:
                if node is None:
                    node = await _start(request)
                    watch = group.create_task(_end_with_go_daemon(node), name="go daemon")
                    answer = {"peer": node.peer, "addresses": list(node.addresses)}
                else:
                    answer = await _answer(node, request)
            except SwarmError as error:
                answer = _refusal(error)
            except Exception as error:  # hivemind's own: the daemon decides, the log tells more
                traceback.print_exc()
                answer = {"error": "failed", "text": f"{type(error).__name__}: {error}"[:1000]}
            await pipe.send(msgpack.packb({"number": number, **answer}))
    except (EOFError, OSError):
        return  # the daemon is gone: so are we
    finally:
        if watch is not None:
            watch.cancel()
        if node is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(2.0):
                    await node.stop()
        pipe.close()


async def _end_with_go_daemon(node: Node) -> None:
    """Without its Go daemon a node is deaf: end, so that the daemon starts both again."""
    await node.go_daemon_ended()
    print("the Go daemon has ended, and so do we", file=sys.stderr, flush=True)
    os._exit(1)


async def _start(request: dict[str, Any]) -> Node:
    assert request.pop("do") == "start", "the first request starts the node"
    return await start_node(**request)


async def _answer(node: Node, request: dict[str, Any]) -> dict[str, Any]:
    match request:
        case {"do": "advertise", "record": bytes(record), "ttl_s": float(ttl_s) | int(ttl_s)}:
            await node.store(record, ttl_s)
            return {}
        case {"do": "records", "first": [*first]}:
            return {
                "records": await node.records(first),
                "refused": dict(node.refused),
                "neighbours": await node.neighbours(),
            }
    raise SwarmError(f"unknown request: {sorted(request)}")


def _refusal(error: SwarmError) -> dict[str, Any]:
    match error:
        case PeerLostError(peer, reason):
            return {"error": "lost", "peer": peer, "text": reason}
        case BusyError():
            return {"error": "busy", "text": str(error)}
        case UserError():
            return {"error": "user", "text": str(error)}
        case _:
            return {"error": "failed", "text": str(error)}


def main() -> None:
    asyncio.run(serve(Pipe.inherit(max_message_bytes=MAX_MESSAGE_BYTES)))


if __name__ == "__main__":
    main()
