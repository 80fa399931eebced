"""The worker child: `python -m swarmnode.worker.engine`, started by the daemon with a pipe.

One thread reads the pipe into a queue, always, so that the daemon never waits for the
computing; the main thread computes. The end of the pipe ends the process.
"""

import gc
import os
import queue
import sys
import threading

from swarmnode.engine_messages import EngineMessage, Warm
from swarmnode.errors import FrameTooLargeError, ProtocolError
from swarmnode.messages import (
    Message,
)
from swarmnode.pipes import ChildPipe
from swarmnode.wire import pack, unpack_local

Inbox = queue.SimpleQueue[tuple[Message | EngineMessage, memoryview] | None]


def main() -> int:
    """Run until the daemon closes the pipe; the exit status."""
    pipe = ChildPipe.inherit()
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_read, args=(pipe, inbox), name="pipe", daemon=True).start()
    gc.disable()  # an import makes no garbage; looking for it takes a sixth of the time
    from swarmnode.worker.engine.engine import Engine  # torch takes seconds to import

    gc.freeze()
    gc.enable()

    def send(message: Message | EngineMessage, payload: bytes | bytearray | memoryview) -> None:
        pipe.send(pack(message), payload)

    engine = Engine(send)
    try:
        send(Warm(), b"")
        busy = False
        while True:
            try:
                received = inbox.get(block=not busy)
            except queue.Empty:
                busy = engine.run_once()
                continue
            if received is None:
                return 0
            engine.handle(*received)
            busy = True
    except (BrokenPipeError, ConnectionResetError):
        return 0
    finally:
        engine.close()


def _read(pipe: ChildPipe, inbox: Inbox) -> None:
    """Read until the end; a message that cannot be read is noted and left out."""
    while True:
        try:
            data = pipe.receive()
        except (EOFError, FrameTooLargeError):
            inbox.put(None)
            return
        try:
            inbox.put(unpack_local(data))
        except ProtocolError as error:
            print(f"message left out: {error}", file=sys.stderr)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # torch takes seconds to take itself down; nothing is left to save
