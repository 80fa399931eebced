"""The trio side of the transport: a py-libp2p host, how it dials and whom it lets in.

TCP, Noise and yamux only: py-libp2p's own defaults would also accept an unencrypted peer.
"""

import logging
import socket
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address
from typing import Any

import psutil
import trio
from libp2p import new_host
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import RetryConfig
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import ProtocolNotSupportedError
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_PROTOCOL_ID
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from swarmnode.errors import PeerLostError, RefusedError
from swarmnode.p2p.buffered import NOISE_PROTOCOL_ID, BufferedNoise, key_pair_from_seed
from swarmnode.p2p.channel import NetStream
from swarmnode.p2p.inbound import MAX_LINE_BYTES, Inbound, bound_unread, refuse_long_reads
from swarmnode.p2p.turns import Turns

MAX_STREAMS_PER_PEER = 256
"""Incoming streams of one peer that may be open at once; more are reset."""
_NEXT_DIAL_DELAY_S = 0.25
_CLOSE_TIMEOUT_S = 1.0

_log = logging.getLogger(__name__)
# py-libp2p prints warnings of every connection that ends; ours are raised as errors instead.
logging.getLogger("libp2p").addHandler(logging.NullHandler())

OnStream = Callable[[NetStream, str], Awaitable[None]]
"""Takes an incoming stream and its proven peer; the stream is gone when it returns."""


class _NoAutoConnector(AutoConnector):  # type: ignore[misc]
    """py-libp2p would dial every peer that it has heard of; we dial when asked."""

    async def maybe_connect(self) -> None:
        """Do nothing."""


class Host:
    """One libp2p host. Everything here runs on the trio side."""

    def __init__(self, seed: bytes, nursery: trio.Nursery) -> None:
        self.turns = Turns()
        """Of all that this host sends."""
        keys = key_pair_from_seed(seed)
        self._noise = BufferedNoise(keys, nursery.start_soon)
        self._host: Any = new_host(
            key_pair=keys,
            sec_opt={NOISE_PROTOCOL_ID: self._noise},
            muxer_opt={YAMUX_PROTOCOL_ID: Yamux},
            disable_identify_address_discovery=True,
        )
        self._network = self._host.get_network()
        # Its limits leak slots when connections die; ours are MAX_STREAMS_PER_PEER.
        self._network.set_resource_manager(None)
        self._network.auto_connector = _NoAutoConnector(self._network)
        self._network.retry_config = RetryConfig(max_retries=0)
        self._network.set_stream_handler(self._take_stream)
        self._inbound = Inbound(self._network)
        bound_unread(self._network)
        self._dial_locks: dict[str, trio.Lock] = defaultdict(trio.Lock)
        self._num_streams: Counter[str] = Counter()

    @classmethod
    @asynccontextmanager
    async def start(cls, seed: bytes, listen: Sequence[str]) -> AsyncIterator["Host"]:
        """Run a host that listens on `listen`. Raises: OSError if an address cannot be had."""
        async with trio.open_nursery() as nursery:
            host = cls(seed, nursery)
            async with host._host.run([]):
                try:
                    for address in listen:
                        await host._listen(Multiaddr(address))
                    yield host
                finally:
                    await host._close()
            nursery.cancel_scope.cancel()

    @property
    def peer(self) -> str:
        return str(self._host.get_id())

    def addresses(self, announce: Sequence[str]) -> tuple[str, ...]:
        """Return `announce`, or else where we listen, with our peer id at the end."""
        listening = (str(address) for address in self._host.get_transport_addrs())
        bare = announce or [each for address in listening for each in _each_interface(address)]
        suffix = f"/p2p/{self.peer}"
        return tuple(address.removesuffix(suffix) + suffix for address in bare)

    def serve(self, protocol: str, on_stream: OnStream) -> None:
        """Give the incoming streams of `protocol` to `on_stream`."""

        async def handle(stream: Any) -> None:
            await on_stream(stream, str(stream.muxed_conn.peer_id))

        self._host.set_stream_handler(protocol, handle)

    async def open(
        self, peer: str, addresses: Sequence[str], protocol: str, timeout_s: float
    ) -> NetStream:
        """Open a stream, dialling if there is no connection.

        Raises: PeerLostError if that takes over `timeout_s` or fails, RefusedError if the peer
        does not serve `protocol`.
        """
        connection: Any = None
        try:
            with trio.fail_after(timeout_s):
                async with self._dial_locks[peer]:
                    connection = self._connection(peer) or await self._dial(peer, addresses)
                return await self._negotiate(connection, peer, protocol)
        except trio.TooSlowError as error:
            if connection is not None:  # it does not answer; one that the peer dialled may
                with suppress(BaseLibp2pError):
                    await connection.close()
            raise PeerLostError(peer, f"no answer within {timeout_s:g} s") from error
        except (BaseLibp2pError, OSError, ValueError) as error:
            raise PeerLostError(peer, f"cannot open a stream: {error}") from error

    async def disconnect(self, peer: str) -> None:
        """Close every connection with `peer`."""
        with suppress(BaseLibp2pError, ValueError):
            await self._network.close_peer(ID.from_string(peer))

    async def _take_stream(self, stream: Any) -> None:
        """Find the protocol of an incoming stream and serve it; what fails is this stream alone.

        py-libp2p lets what it does not expect of a peer's bytes end the whole host.
        """
        peer = str(stream.muxed_conn.peer_id)
        if self._num_streams[peer] >= MAX_STREAMS_PER_PEER:
            await stream.reset()
            return
        self._num_streams[peer] += 1
        refuse_long_reads(stream, MAX_LINE_BYTES)
        try:
            await self._host._swarm_stream_handler(stream)
        except Exception as error:
            _log.info("a stream of %s failed: %r", peer, error)
            await stream.reset()
        finally:
            self._num_streams[peer] -= 1
            self._num_streams += Counter()  # drops zeroes

    async def _listen(self, address: Multiaddr) -> None:
        _check_port_is_free(address)
        if not await self._network.listen(address):
            raise OSError(f"cannot listen on {address}")

    async def _close(self) -> None:
        with trio.CancelScope(shield=True), trio.move_on_after(_CLOSE_TIMEOUT_S):
            self._noise.abort_all()
            await self._host.close()

    def _connection(self, peer: str) -> Any:
        for connection in self._network.get_connections(ID.from_string(peer)):
            if not connection.is_closed and connection.muxed_conn.is_established:
                return connection
        return None

    async def _dial(self, peer: str, addresses: Sequence[str]) -> Any:
        """Try the addresses side by side, each a little later than the one before."""
        failures: list[str] = []
        connections: list[Any] = []
        async with trio.open_nursery() as nursery:

            async def attempt(address: str, failed: trio.Event) -> None:
                try:
                    connections.append(await self._dial_one(peer, address))
                    nursery.cancel_scope.cancel()
                except (BaseLibp2pError, OSError, ValueError) as error:
                    failures.append(f"{address}: {_root_cause(error)}")
                    failed.set()

            for address in addresses:
                failed = trio.Event()
                nursery.start_soon(attempt, address, failed)
                with trio.move_on_after(_NEXT_DIAL_DELAY_S):
                    await failed.wait()
        if not connections:
            raise PeerLostError(peer, f"unreachable: {'; '.join(failures) or 'no address known'}")
        return connections[0]

    async def _dial_one(self, peer: str, address: str) -> Any:
        multiaddr = Multiaddr(address)
        if "tcp" not in {protocol.name for protocol in multiaddr.protocols()}:
            raise ValueError("not a TCP address")
        return await self._network.dial_addr(multiaddr, ID.from_string(peer))

    async def _negotiate(self, connection: Any, peer: str, protocol: str) -> NetStream:
        stream = await connection.new_stream()
        client, communicator = self._host.multiselect_client, MultiselectCommunicator(stream)
        try:
            await client.handshake(communicator)
            await client.try_select(communicator, protocol)
        except BaseException as error:
            with trio.CancelScope(shield=True), trio.move_on_after(1.0):
                await stream.reset()
            if isinstance(error, ProtocolNotSupportedError):
                raise RefusedError(peer, f"does not serve {protocol}") from error
            raise
        return stream  # type: ignore[no-any-return]


def _each_interface(address: str) -> list[str]:
    """Return `address`, with the addresses of this machine in place of a wildcard."""
    for prefix, family in (("/ip4/0.0.0.0/", socket.AF_INET), ("/ip6/::/", socket.AF_INET6)):
        if address.startswith(prefix):
            kind, rest = prefix.split("/")[1], address.removeprefix(prefix)
            hosts = [
                entry.address
                for entries in psutil.net_if_addrs().values()
                for entry in entries
                if entry.family == family and "%" not in entry.address  # link-local has a scope
            ]
            routable = [host for host in hosts if not ip_address(host).is_loopback]
            return [f"/{kind}/{host}/{rest}" for host in routable or hosts]
    return [address]


def _check_port_is_free(address: Multiaddr) -> None:
    """Raise OSError if another process listens there: py-libp2p would share the port with it."""
    host = address.value_for_protocol(address.protocols()[0].code)
    port = int(address.value_for_protocol("tcp"))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(f"cannot listen on {address}: {error.strerror}") from error


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__
