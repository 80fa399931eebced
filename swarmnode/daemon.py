"""The composition root: one node, all its services in one TaskGroup, until a signal ends it."""

import asyncio
import contextlib
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

from swarmnode import telemetry
from swarmnode.config import NodeConfig
from swarmnode.errors import SwarmError, UserError
from swarmnode.home import locked
from swarmnode.network import (
    LastLife,
    load_last_life,
    save_last_life,
    start_directory,
    start_transport,
)
from swarmnode.node import Node
from swarmnode.p2p.identity import load_or_create
from swarmnode.p2p.session import first_error
from swarmnode.services import Services
from swarmnode.worker.probe import probe


def run(config: NodeConfig, on_ready: Callable[[Node], None]) -> int:
    """Run a node in the foreground until SIGINT or SIGTERM; the exit status.

    Raises: UserError for what the user can mend, SwarmError otherwise.
    """
    try:
        import uvloop

        new_loop: Callable[[], asyncio.AbstractEventLoop] | None = uvloop.new_event_loop
    except ImportError:
        new_loop = None
    with asyncio.Runner(loop_factory=new_loop) as runner:
        try:
            runner.run(main(config, on_ready))
        except BaseExceptionGroup as failures:
            error = first_error(failures)
            if isinstance(error, OSError) and error.errno is not None:  # not just a timeout
                where = error.filename or config.home
                raise SwarmError(f"{where} cannot be used: {error.strerror}") from failures
            raise error from failures
    return 0


@dataclass
class _Life:
    """One run of the node: requests to end it, and what is there to leave."""

    stops: asyncio.Queue[None] = field(default_factory=asyncio.Queue)
    services: Services | None = None


async def main(config: NodeConfig, on_ready: Callable[[Node], None]) -> None:
    """Run a node until a signal asks it to stop; a second one does not wait for the first."""
    life = _Life()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, life.stops.put_nowait, None)
    with locked(config.home):
        async with asyncio.TaskGroup() as group:
            node = group.create_task(_run(config, on_ready, life), name="node")
            group.create_task(_cancel_when_asked(life, node), name="stop")


async def _cancel_when_asked(life: _Life, node: asyncio.Task[None]) -> None:
    """The first signal begins to leave, where there is something to leave; the next one ends it."""
    await life.stops.get()
    if life.services is not None:
        leave = asyncio.create_task(life.services.leave(), name="leave")
        at_once = asyncio.create_task(life.stops.get(), name="leave at once")
        await asyncio.wait([leave, at_once], return_when=asyncio.FIRST_COMPLETED)
        leave.cancel()
        at_once.cancel()
    node.cancel()


async def _run(config: NodeConfig, on_ready: Callable[[Node], None], life: _Life) -> None:
    """Start everything in order, and end it in the other order when cancelled."""
    home = config.home
    identity = load_or_create(home / "identity.key")
    telemetry.configure_logging(config.log_level, path=home / "daemon.log", peer=identity.peer)
    device = await probe(home)
    if config.device == "cuda" and device.kind != "cuda":
        raise UserError("no CUDA device is usable here; use --device auto or cpu")
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(telemetry.close_logging)
        last, log = load_last_life(home), telemetry.get_logger("directory").info
        directory = await stack.enter_async_context(start_directory(config, identity, last, log))
        transport = await stack.enter_async_context(start_transport(config, identity, last))
        transport_port = int(transport.addresses[0].split("/")[4])
        join = config.join or last.join
        try:
            save_last_life(home, LastLife(directory.port, transport_port, join))
        except OSError as error:  # others find it by the ports of the life before, or by --join
            log("ports not remembered", reason=str(error))
        group = await stack.enter_async_context(asyncio.TaskGroup())
        services = Services(config, identity, device, directory, transport, group)
        loops = (services.advertise, services.look, services.observe, services.measure)
        for work in (*loops, services.sweep, services.worker.nurse):
            group.create_task(work(), name=work.__name__)
        services.node.finish = lambda: life.stops.put_nowait(None)
        life.services = services
        await services.restore()  # first: whoever asks for a job of an earlier life finds it
        group.create_task(services.serve(on_ready), name="http")
        await asyncio.Event().wait()  # until cancelled
