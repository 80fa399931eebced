"""The worker child: `python -m swarmnode.worker.engine`, started by the daemon with a pipe.

One thread reads the pipe into an inbox, always, so that the daemon never waits for the
computing; the main thread computes. The end of the pipe ends the process.
"""

import gc
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn

from swarmnode.engine_messages import Configure, EngineMessage, Warm
from swarmnode.errors import FrameTooLargeError, ProtocolError
from swarmnode.messages import (
    Message,
)
from swarmnode.pipes import ChildPipe
from swarmnode.wire import pack, unpack_local
from swarmnode.worker.engine.inbox import LEAST_BYTES, Inbox

if TYPE_CHECKING:
    from swarmnode.worker.engine.engine import Engine

_LEAST_TURN_S = 0.01


def main() -> int:
    """Run until the daemon closes the pipe; the exit status."""
    pipe = ChildPipe.inherit()
    inbox = Inbox()
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
        _run(engine, inbox)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0
    finally:
        engine.close()


def _run(engine: "Engine", inbox: Inbox) -> NoReturn:
    """Take messages and compute in turns, so that neither keeps the other waiting for ever.

    Messages get as long as the last unit of computing took. Raises: EOFError with the pipe's end.
    """
    is_busy, unit_s = False, 0.0
    while True:
        received = inbox.get(block=not is_busy)
        end_s = time.monotonic() + max(unit_s, _LEAST_TURN_S)
        while received is not None:
            engine.handle(*received)
            if isinstance(received[0], Configure):
                inbox.limit_bytes = max(LEAST_BYTES, engine.expected_bytes)
            received = inbox.get(block=False) if time.monotonic() < end_s else None
        engine.count_overruns(inbox.num_dropped)
        began_s = time.monotonic()
        is_busy = engine.run_once()
        unit_s = time.monotonic() - began_s


def _read(pipe: ChildPipe, inbox: Inbox) -> None:
    """Read until the end; a message that cannot be read is noted and left out."""
    while True:
        try:
            data = pipe.receive()
        except (EOFError, FrameTooLargeError):
            inbox.close()
            return
        try:
            inbox.put(*unpack_local(data))
        except ProtocolError as error:
            print(f"message left out: {error}", file=sys.stderr)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # torch takes seconds to take itself down; nothing is left to save
