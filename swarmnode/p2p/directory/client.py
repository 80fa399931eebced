"""The daemon's side of the directory: requests to the child that holds the DHT node.

hivemind and libp2p cannot share a process, and hivemind's Go daemon must never outlive us; both
are the child's business. One request is under way at a time.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn

import msgpack

from swarmnode.children import Child, python_module, spawn_child
from swarmnode.errors import BusyError, ChildError, PeerLostError, SwarmError, UserError
from swarmnode.p2p.adverts import MAX_RECORD_BYTES
from swarmnode.p2p.identity import Identity
from swarmnode.p2p.membership import MAX_PEERS

MAX_MESSAGE_BYTES = 2 * MAX_PEERS * MAX_RECORD_BYTES
"""An answer has at most MAX_PEERS records: twice the bytes of the largest, names and all."""
_LEAN = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "GOMAXPROCS": "2",
    "GOGC": "50",
    "HIVEMIND_LOGLEVEL": "ERROR",
    "GOLOG_LOG_LEVEL": "error",
}
"""For the child and its Go daemon: few threads, a tight heap, and only errors in the log."""


class Directory:
    """Who is here, according to the DHT: adverts as subkeys of one key, each with its expiry."""

    def __init__(self, child: Child, addresses: Sequence[str], timeout_s: float) -> None:
        self._child = child
        self._timeout_s = timeout_s
        self._asking = asyncio.Lock()
        self._number = 0
        self._refused: dict[str, int] = {}
        self.addresses = tuple(addresses)
        """Multiaddrs of our DHT node, those that other hosts can use first; others join by them."""
        self.neighbours: tuple[str, ...] = ()
        """Multiaddrs of other DHT nodes, as of the last `records`."""

    @classmethod
    @asynccontextmanager
    async def start(
        cls,
        identity: Identity,
        home: Path,
        listen_host: str,
        port: int = 0,
        join: Sequence[str] = (),
        *,
        announce: Sequence[str] = (),
        start_timeout_s: float = 30.0,
        timeout_s: float = 15.0,
    ) -> "AsyncIterator[Directory]":
        """Run a DHT node in a child for as long as the context lasts.

        `listen_host` is an IP address of this host, 0.0.0.0 or :: for all; port 0 is any free
        one. `announce` replaces the addresses told to others (a forwarded port, say). The child
        logs to `home`/directory.log.
        Raises: PeerLostError if `join` is not empty and none of its peers answers, BusyError if
        the port is in use, UserError for an impossible address, ChildError if it cannot start.
        """
        child = spawn_child(
            python_module("swarmnode.p2p.directory.child"),
            env=_LEAN,
            name="directory",
            log=home / "directory.log",
            max_message_bytes=MAX_MESSAGE_BYTES,
        )
        try:
            directory = cls(child, (), timeout_s)
            answer = await directory._ask(
                start_timeout_s + 5.0,  # the child gives up first, and says why
                do="start",
                key=identity.protobuf,
                home=str(home),
                host=listen_host,
                port=port,
                join=list(join),
                announce=list(announce),
                limit_s=start_timeout_s,
            )
            assert answer["peer"] == identity.peer, "the DHT derives the same peer id"
            directory.addresses = tuple(answer["addresses"])
            yield directory
        finally:
            await child.stop()

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    @property
    def refused(self) -> Mapping[str, int]:
        """Records of others that our node refused to store or believe, by reason, as of the last
        `records`."""
        return dict(self._refused)

    async def advertise(self, record: bytes, ttl_s: float) -> None:
        """Store our record for `ttl_s`, at most until the advert in it ends; renew in time.

        Raises: PeerLostError if no node took it, ChildError if the child ended or is stuck.
        """
        await self._ask(self._timeout_s, do="advertise", record=record, ttl_s=ttl_s)

    async def records(self, first: Iterable[str] = ()) -> dict[str, bytes]:
        """The records that are reachable now, by peer id; our own among them.

        Where there are more than MAX_PEERS, those of `first` go before others, in that order: no
        number of strangers displaces who is known. Every one had a valid signature of that peer
        when our node saw it; decode them all the same.
        Raises: ChildError if the child ended or is stuck.
        """
        answer = await self._ask(self._timeout_s, do="records", first=list(first))
        self._refused = answer["refused"]
        self.neighbours = tuple(answer["neighbours"])
        records: dict[str, bytes] = answer["records"]
        return records

    async def wait(self) -> NoReturn:
        """Return never: raise ChildError when the child has ended."""
        status = await self._child.wait()
        raise ChildError(f"directory ended with status {status}")

    async def _ask(self, timeout_s: float, **request: Any) -> Any:
        async with self._asking:
            self._number += 1
            try:
                async with asyncio.timeout(timeout_s):
                    await self._child.send(msgpack.packb({"number": self._number, **request}))
                    while True:
                        answer = msgpack.unpackb(await self._child.receive())
                        if answer["number"] == self._number:  # an older one was given up
                            break
            except TimeoutError:
                raise ChildError(f"directory: no answer in {timeout_s:.0f} s") from None
            except (ValueError, TypeError, LookupError, msgpack.UnpackException) as error:
                self._child.kill()  # whatever comes next would be no better
                raise ChildError(f"directory: {error!r} in an answer") from error
        if "error" in answer:
            raise _error(answer["error"], answer["text"], answer.get("peer", ""))
        return answer


def _error(kind: str, text: str, peer: str) -> SwarmError:
    match kind:
        case "lost":
            return PeerLostError(peer, text)
        case "busy":
            return BusyError(text)
        case "user":
            return UserError(text)
        case _:
            return ChildError(f"directory: {text}")
