"""How a node reaches the others: its directory and its transport, on the ports of its last life."""

import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swarmnode.config import NodeConfig
from swarmnode.errors import BusyError, PeerError, UserError
from swarmnode.home import write_private
from swarmnode.p2p.directory.client import Directory
from swarmnode.p2p.directory.keeper import KeptDirectory
from swarmnode.p2p.identity import Identity
from swarmnode.p2p.streams import Libp2pTransport

NETWORK_FILE = "network.json"


@dataclass(frozen=True)
class LastLife:
    """What a node remembers, so that others find it where it was, and it finds them."""

    directory_port: int = 0
    transport_port: int = 0
    join: tuple[str, ...] = ()


def load_last_life(home: Path) -> LastLife:
    """What `save_last_life` wrote; nothing if there is none, or it is damaged."""
    try:
        stored = json.loads((home / NETWORK_FILE).read_text(encoding="utf-8"))
        ports = (_port(stored["directory_port"]), _port(stored["transport_port"]))
        return LastLife(*ports, tuple(str(address) for address in stored["join"]))
    except (OSError, ValueError, KeyError, TypeError):
        return LastLife()


def _port(stored: Any) -> int:
    """0, for any, where it cannot be one: others find us under another then."""
    port = int(stored)
    return port if 0 <= port < 1 << 16 else 0


def save_last_life(home: Path, life: LastLife) -> None:
    write_private(home / NETWORK_FILE, json.dumps(asdict(life)) + "\n")


@contextlib.asynccontextmanager
async def start_directory(
    config: NodeConfig, identity: Identity, last: LastLife, log: Callable[..., None]
) -> AsyncIterator[KeptDirectory]:
    """Who is here. Raises: BusyError if the port is taken, UserError if nobody can be joined."""
    join = config.join or last.join

    def open_directory(
        port: int, neighbours: Sequence[str]
    ) -> AbstractAsyncContextManager[Directory]:
        announce = _announced(config, config.directory_port)
        through = list(dict.fromkeys((*join, *neighbours)))
        return Directory.start(
            identity, config.home, config.listen_host, port, through, announce=announce
        )

    async with contextlib.AsyncExitStack() as stack:
        try:
            try:
                port = config.directory_port or last.directory_port
                kept = KeptDirectory.start(open_directory, port, log)
                directory = await stack.enter_async_context(kept)
            except BusyError:
                if config.directory_port:
                    raise
                kept = KeptDirectory.start(open_directory, 0, log)
                directory = await stack.enter_async_context(kept)
        except PeerError:
            raise UserError(
                f"no node answers at {', '.join(join)}; check that the node to join runs, "
                "that this is the address which it printed, and that its port is open"
            ) from None
        yield directory


@contextlib.asynccontextmanager
async def start_transport(
    config: NodeConfig, identity: Identity, last: LastLife
) -> AsyncIterator[Libp2pTransport]:
    """The transport of tensors. Raises: BusyError if the port is taken."""
    version = "ip6" if ":" in config.listen_host else "ip4"
    announce = _announced(config, config.transport_port)

    def start(port: int) -> AbstractAsyncContextManager[Libp2pTransport]:
        listen = [f"/{version}/{config.listen_host}/tcp/{port}"]
        return Libp2pTransport.start(identity.seed, listen, announce)

    async with contextlib.AsyncExitStack() as stack:
        try:
            port = config.transport_port or last.transport_port
            transport = await stack.enter_async_context(start(port))
        except OSError as error:
            if config.transport_port:
                text = f"{error}; give another --transport-port or --host"
                raise BusyError(text) from error
            transport = await stack.enter_async_context(start(0))
        yield transport


def _announced(config: NodeConfig, port: int) -> list[str]:
    """The addresses that others are told, where they are not the ones listened on."""
    host = config.announce_host
    if host is None:
        return []
    if port == 0:
        raise UserError("announce_host needs fixed ports: give --transport-port, --directory-port")
    version = "ip6" if ":" in host else "ip4" if host[0].isdecimal() else "dns"
    return [f"/{version}/{host}/tcp/{port}"]
