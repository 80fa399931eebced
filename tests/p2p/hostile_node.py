"""A directory node without scruples, for tests: stores whatever it is told and spreads it.

Started by a test with a pipe; a request is a msgpack map: start arguments, or key, subkey, value
and ttl_s to store; without a subkey, value is a map of many. Honest nodes do not trust it; that is
the point.
"""

import asyncio
import time
from typing import Any

import msgpack

from swarmnode.p2p.directory import node as honest
from swarmnode.pipes import Pipe


async def main() -> None:
    pipe = Pipe.inherit()
    honest.AdvertValidator.validate = lambda self, record: True  # type: ignore[method-assign]
    node = await honest.start_node(**msgpack.unpackb(await pipe.receive()))
    await pipe.send(msgpack.packb(list(node.addresses)))
    try:
        while True:
            request: dict[str, Any] = msgpack.unpackb(await pipe.receive())
            await pipe.send(msgpack.packb(await store(node, **request)))
    except EOFError:
        await node.stop()


async def store(node: honest.Node, key: str, subkey: Any, value: Any, ttl_s: float) -> list[Any]:
    """Keep it ourselves and ask every other node to keep it; what each of those answered.

    Many are not spread: who looks finds them here.
    """
    dht = node._dht
    key_id, until_s = honest.DHTID.generate(source=key), time.time() + ttl_s
    if subkey is None:
        for each, one in value.items():
            raw = dht.protocol.serializer.dumps(one)
            dht.protocol.storage.store(key_id, raw, until_s, subkey=each)
        return []
    raw = dht.protocol.serializer.dumps(value)
    dht.protocol.storage.store(key_id, raw, until_s, subkey=subkey)
    others = dht.protocol.routing_table.get_nearest_neighbors(key_id, 20)
    return [
        list(await dht.protocol.call_store(peer, [key_id], [raw], until_s, [subkey]) or ())
        for _, peer in others
    ]


if __name__ == "__main__":
    asyncio.run(main())
