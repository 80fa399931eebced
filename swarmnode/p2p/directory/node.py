"""hivemind's DHT node, tamed: no torch, a Go daemon that dies with us, only signed adverts.

Import this in the directory child only: hivemind and libp2p cannot share a process.
"""

import asyncio
import contextlib
import errno
import ipaddress
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import msgpack

from swarmnode.children import leashed
from swarmnode.domain import Advert
from swarmnode.errors import BusyError, ChildError, PeerLostError, UserError
from swarmnode.p2p.adverts import (
    CLOCK_SLACK_S,
    MAX_LEASE_S,
    MAX_RECORD_BYTES,
    BadAdvertError,
    authenticate,
)
from swarmnode.p2p.directory.lean import (
    DHTID,
    P2P,
    ControlFailure,
    DHTNode,
    DHTRecord,
    Multiaddr,
    P2PDaemonError,
    PeerID,
    RecordValidatorBase,
    ValidationError,
)
from swarmnode.p2p.identity import public_key_of
from swarmnode.p2p.membership import MAX_PEERS

_KEY = "swarmnode.adverts.1"
_MAX_SUBKEY_BYTES = 80
_NUM_REPLICAS = 8
_REJOIN_TIMEOUT_S = 3.0
_MAX_NEIGHBOURS = 16


class LeashedP2P(P2P):  # type: ignore[misc]
    """hivemind's daemon control, but the kernel kills the Go daemon together with us."""

    @staticmethod
    def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
        return leashed(P2P._make_process_args(*args, **kwargs))


class AdvertValidator(RecordValidatorBase):  # type: ignore[misc]
    """Accepts adverts signed by the peer that the subkey names, and nothing else at all.

    So nobody can overwrite another's advert, keep it alive longer than its owner signed, or use
    our memory for other things. Clock-free but for the longest lease: a record may end on its way.
    """

    def __init__(self) -> None:
        self.refused: Counter[str] = Counter()
        self._key = DHTID.generate(source=_KEY).to_bytes()
        self._authenticate = lru_cache(maxsize=4 * MAX_PEERS)(authenticate)

    def validate(self, record: DHTRecord) -> bool:
        try:
            self.check(record)
        except BadAdvertError as error:
            self.refused[error.reason] += 1
            return False
        return True

    def check(self, record: DHTRecord) -> Advert:
        """Raises: BadAdvertError with the reason."""
        if record.key != self._key:
            raise BadAdvertError("foreign", "another key")
        if len(record.value) > MAX_RECORD_BYTES + 5 or len(record.subkey) > _MAX_SUBKEY_BYTES:
            raise BadAdvertError("size", f"{len(record.value)} bytes")
        owner, value = _unpack(record.subkey), _unpack(record.value)
        if not isinstance(owner, str) or not isinstance(value, bytes):
            raise BadAdvertError("schema", "not a record under a name")
        advert = self._authenticate(value, owner=owner)
        if not 0.0 < record.expiration_time <= advert.expires_at_s:
            raise BadAdvertError("lease", "kept longer than its owner signed")
        if advert.expires_at_s > time.time() + MAX_LEASE_S + CLOCK_SLACK_S:
            raise BadAdvertError("lease", "too far ahead")
        return advert


class Node:
    """A running DHT node."""

    def __init__(
        self, dht: Any, validator: AdvertValidator, addresses: Sequence[str], join: Sequence[str]
    ) -> None:
        self._dht = dht
        self._validator = validator
        self._join = tuple(join)
        self.peer: str = dht.peer_id.to_base58()
        self.addresses = tuple(addresses)

    @property
    def refused(self) -> Mapping[str, int]:
        """Records that this node did not store or believe, by reason."""
        return self._validator.refused

    async def store(self, record: bytes, ttl_s: float) -> None:
        """Store a record of ours at the nearest nodes. Raises: UserError if it is not valid,
        PeerLostError if nobody took it."""
        try:
            advert = authenticate(record, owner=self.peer)
        except BadAdvertError as error:
            raise UserError(str(error)) from error
        until_s = min(time.time() + ttl_s, advert.expires_at_s)
        if await self._dht.store(_KEY, record, until_s, subkey=self.peer):
            return
        # hivemind tells the answer of the last replica only, and that one may be hostile
        if (await self.records(())).get(self.peer) != record:
            raise PeerLostError("", "no node of the directory took our advert")

    async def records(self, first: Iterable[str]) -> dict[str, bytes]:
        """The records that can be found now, merged over all nodes that hold some.

        Bound: MAX_PEERS; ours and those of `first` go before others.
        """
        if not self._dht.protocol.routing_table.uid_to_peer_id:
            await self._rejoin()
        # no expiry satisfies: a peer that claims an endless one must not end the search early
        found = await self._dht.get(_KEY, sufficient_expiration_time=math.nan)
        if found is None:
            return {}
        records = {subkey: item.value for subkey, item in found.value.items()}
        here = (peer for peer in dict.fromkeys((self.peer, *first, *records)) if peer in records)
        return {peer: records[peer] for peer in islice(here, MAX_PEERS)}

    async def neighbours(self) -> list[str]:
        """Addresses of peers that we are connected to: some may outlive the bootstrap peers."""
        found = await self._dht.p2p.list_peers()
        addresses = (f"{address}/p2p/{info.peer_id}" for info in found for address in info.addrs)
        return [address for address in addresses if "p2p-circuit" not in address][:_MAX_NEIGHBOURS]

    async def _rejoin(self) -> None:
        """Knock at the bootstrap peers again: after an outage hivemind has forgotten everybody."""
        for address in self._join:
            host, _, peer = address.rpartition("/p2p/")
            peer_id = PeerID.from_base58(peer)
            with contextlib.suppress(ControlFailure, TimeoutError):
                async with asyncio.timeout(_REJOIN_TIMEOUT_S):
                    await self._dht.p2p._client.connect(peer_id, [Multiaddr(host)])
                    if await self._dht.protocol.call_ping(peer_id) is not None:
                        return

    async def go_daemon_ended(self) -> None:
        """Return when p2pd is gone, for whatever reason."""
        await self._dht.p2p._child.wait()

    async def stop(self) -> None:
        await self._dht.shutdown()


async def start_node(
    *,
    key: bytes,
    home: str,
    host: str,
    port: int,
    join: Sequence[str],
    announce: Sequence[str],
    limit_s: float,
) -> Node:
    """Start the Go daemon and the DHT node over it, and join through any of `join`.

    Raises: BusyError, PeerLostError, UserError, ChildError; see Directory.start.
    """
    listen = _listen_address(host, port)
    for address in join:
        if not address.startswith("/") or public_key_of(address.rpartition("/p2p/")[2]) is None:
            raise UserError(f"{address} is not an address of a node: /ip4/.../tcp/.../p2p/...")
    is_local = ipaddress.ip_address(host).is_loopback
    _check_free(host, port)
    LeashedP2P._UNIX_SOCKET_PREFIX = f"/unix{_socket_folder(Path(home))}/"
    key_file = Path(home) / "p2pd.key"
    validator = AdvertValidator()
    p2p = None
    try:
        async with asyncio.timeout(limit_s):
            _write_private(key_file, key)
            try:
                p2p = await LeashedP2P.create(
                    identity_path=str(key_file),
                    check_if_identity_free=False,
                    host_maddrs=[listen],
                    initial_peers=list(join) or None,
                    announce_maddrs=list(announce) or None,
                    nat_port_map=not is_local,
                    auto_nat=not is_local,
                    startup_timeout=limit_s - 1.0,
                )
            finally:
                key_file.unlink(missing_ok=True)
            dht = await DHTNode.create(
                p2p,
                initial_peers=list(join) or None,
                num_replicas=_NUM_REPLICAS,
                cache_locally=False,
                cache_nearest=0,
                cache_on_store=False,
                cache_refresh_before_expiry=0,
                reuse_get_requests=False,
                record_validator=validator,
            )
            addresses = await p2p.get_visible_maddrs(latest=True)
        return Node(dht, validator, _reachable_first(addresses), join)
    except BaseException as error:
        if p2p is not None:
            await p2p.shutdown()
        _translate(error, host, port, join)
        raise


def _translate(error: BaseException, host: str, port: int, join: Sequence[str]) -> None:
    """Raise our error for one of hivemind's; return for everything else."""
    text = str(error)
    match error:
        case ValidationError() if "local time" in text:
            raise UserError(f"this machine's clock differs from the swarm's: {text}") from error
        case ValidationError() | TimeoutError() if join:
            raise PeerLostError(join[0], text or "no bootstrap peer in time") from error
        case P2PDaemonError() if "address already in use" in text:
            raise BusyError(f"port {port} of {host} is in use") from error
        case P2PDaemonError() if join and (
            "bootstrap peers" in text or "failed to start in" in text
        ):
            raise PeerLostError(join[0], "no bootstrap peer answers") from error
        case RuntimeError() if "bootstrap failed" in text:
            raise PeerLostError(join[0], "no bootstrap peer answers") from error
        case P2PDaemonError() | TimeoutError() | RuntimeError():
            raise ChildError(f"the directory's daemon cannot start: {text}") from error


def _listen_address(host: str, port: int) -> str:
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        raise UserError(f"{host} is not an IP address to listen on") from None
    if not 0 <= port < 1 << 16:
        raise UserError(f"{port} is not a port")
    return f"/ip{version}/{host}/tcp/{port}"


def _check_free(host: str, port: int) -> None:
    """Raise BusyError if somebody listens there; the Go daemon would share the port in silence."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError as error:
            raise UserError(f"may not listen on port {port}") from error
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise BusyError(f"port {port} of {host} is in use") from error
            raise UserError(f"cannot listen on {host}: {error.strerror}") from error


def _socket_folder(home: Path) -> str:
    """A short name for our private folder of the Go daemon's control sockets, emptied first.

    A unix socket's path holds 107 bytes, too few for a deep home: so we keep the folder open, and
    its name goes through our entry in /proc. (The Go daemon exists for Linux only.)
    """
    folder = home / "sockets"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for stale in folder.glob("*.sock"):  # of a run that was killed
        stale.unlink(missing_ok=True)
    return f"/proc/{os.getpid()}/fd/{os.open(folder, os.O_RDONLY | os.O_DIRECTORY)}"


def _write_private(path: Path, content: bytes) -> None:
    """Raises: UserError if the disk is full or broken; nothing is left then."""
    try:
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(fd, "wb") as file:
            file.write(content)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def _reachable_first(addresses: Sequence[Any]) -> list[str]:
    """Addresses for other hosts first, then loopback; relayed ones last."""

    def rank(address: str) -> tuple[bool, bool, str]:
        is_loopback = address.startswith(("/ip4/127.", "/ip6/::1/"))
        return ("p2p-circuit" in address, is_loopback, address)

    return sorted({str(address) for address in addresses}, key=rank)


def _unpack(raw: bytes) -> Any:
    try:
        return msgpack.unpackb(raw, raw=False, max_ext_len=0)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise BadAdvertError("schema", "not msgpack") from error
