"""One end of a shaped link, in a process of its own: sends frames, or times them and says how fast.

usage: link_peer.py send|receive|mix|order OWN_ADDRESS; both print a JSON line, and read that of the
other. `mix` sends gradients and then a hidden state, `order` says in what order they came.
"""

import asyncio
import json
import sys
import time
from dataclasses import replace

import uvloop
from switch_nodes import JOB, frame

from swarmnode.domain import Generation, PeerId, Plan
from swarmnode.messages import Frame
from swarmnode.p2p.links import LinkTable
from swarmnode.p2p.streams import Libp2pTransport
from swarmnode.p2p.switch import Switch, TensorMessage

NUM_FRAMES = 10
NUM_GRADIENTS = 4
FRAME_BYTES = 1 << 20


async def main(role: str, address: str) -> None:
    table = LinkTable()
    done = asyncio.Event()
    kinds: list[str] = []

    def on_transfer(peer: PeerId, num_bytes: int, seconds: float) -> None:
        table.observe_transfer(peer, num_bytes, seconds, time.monotonic())

    async def to_worker(message: TensorMessage, _payload: object) -> None:
        assert isinstance(message, Frame)
        kinds.append(message.kind)
        if message.microbatch == NUM_FRAMES - 1 or len(kinds) == NUM_GRADIENTS + 1:
            done.set()

    async with (
        Libp2pTransport.start(role[0].encode() * 32, [f"/ip4/{address}/tcp/0"]) as transport,
        asyncio.TaskGroup() as group,
    ):
        switch = Switch(transport, group, print, lambda _kind, _bytes: None, on_transfer)
        tell({"peer": transport.peer, "addresses": list(transport.addresses)})
        other = json.loads(await asyncio.to_thread(sys.stdin.readline))
        peer = PeerId(other["peer"])
        rows = (transport.peer,), (peer,)
        plan = Plan(
            Generation(1),
            ((0, 1), (1, 2)),
            rows if role in ("send", "mix") else rows[::-1],
            PeerId("head"),
            addresses={peer: tuple(other["addresses"])},
        )
        switch.join(JOB, plan, to_worker=to_worker)
        tell("joined")
        await asyncio.to_thread(sys.stdin.readline)
        if role == "send":
            for number in range(NUM_FRAMES):
                await switch.send(frame(0, 1, mb=number), bytes(FRAME_BYTES))
        elif role == "mix":
            for number in range(NUM_GRADIENTS):
                gradient = replace(frame(0, 1), kind="gradient", part=number)
                await switch.send(gradient, bytes(FRAME_BYTES))
            await switch.send(frame(0, 1), bytes(FRAME_BYTES))
        elif role == "order":
            await done.wait()
            tell(kinds)
        else:
            await done.wait()
            tell(table.estimates(time.monotonic())[peer].received_bytes_per_s)
        await asyncio.to_thread(sys.stdin.readline)
        switch.leave(JOB, worker=True)


def tell(value: object) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as the daemon does
        runner.run(main(*sys.argv[1:]))
