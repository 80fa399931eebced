"""The directory with real nodes: found, refused, lost, and never left behind."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import psutil
import pytest
from advert_makers import identity, record

from swarmnode.children import spawn_child
from swarmnode.errors import BusyError, ChildError, PeerLostError, UserError
from swarmnode.p2p.directory import Directory
from swarmnode.p2p.directory.keeper import KeptDirectory
from swarmnode.p2p.membership import MAX_PEERS, Joined, Membership, Records

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform != "linux", reason="hivemind's Go daemon is for Linux only"),
]
KEY = "swarmnode.adverts.1"


def start(number: int, home: Path, **more: Any) -> Any:
    return Directory.start(identity(number), home / str(number), "127.0.0.1", **more)


async def until(
    directory: Directory | KeptDirectory, is_so: Callable[[dict[str, bytes]], bool]
) -> None:
    """Ask for the records again and again until they are as wanted; fails after 20 s."""
    async with asyncio.timeout(20):
        while not is_so(await directory.records()):  # noqa: ASYNC110 - other processes decide
            await asyncio.sleep(0.02)


async def until_gone(*processes: psutil.Process) -> None:
    """Wait for the end of processes, strangers too, without reaping them; fails after 10 s."""
    for process in processes:
        try:
            pidfd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            continue
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(pidfd, ended.set)
        try:
            async with asyncio.timeout(10):
                await ended.wait()
        finally:
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)


def go_daemon(directory_pid: int) -> psutil.Process:
    (daemon,) = psutil.Process(directory_pid).children()
    assert daemon.name() == "p2pd"
    return daemon


async def test_three_nodes_see_each_other_and_the_death_of_the_first(tmp_path: Path) -> None:
    async with start(1, tmp_path) as first, start(2, tmp_path, join=first.addresses) as second:
        dead = f"/ip4/127.0.0.1/tcp/9/p2p/{identity(9).peer}"
        async with start(3, tmp_path, join=[dead, *first.addresses]) as third:
            nodes = [(1, first), (2, second), (3, third)]
            expected = {}
            for number, node in nodes:
                mine = record(identity(number), time.time() + 60)
                await node.advertise(mine, 60)
                expected[identity(number).peer] = mine
            for _, node in nodes:
                await until(node, lambda found: found == expected)
                assert node.refused == {}

            os.kill(first.pid, signal.SIGKILL)
            await until(second, lambda found: found == expected)
            newer = record(identity(3), time.time() + 61, incarnation=2)
            await third.advertise(newer, 61)
            await until(second, lambda found: found[identity(3).peer] == newer)

            members = Membership(lease_s=30)
            effects = members.handle(Records(await second.records()), time.time())
            assert [type(effect) for effect in effects] == [Joined] * 3
            assert members.dropped == {}


async def test_a_lonely_node_finds_its_restarted_bootstrap_peer(tmp_path: Path) -> None:
    async with start(1, tmp_path) as first:
        port = int(first.addresses[0].split("/")[4])
        joining = start(2, tmp_path, join=first.addresses)
        second = await joining.__aenter__()
    try:
        await second.advertise(record(identity(2), time.time() + 60), 60)
        assert set(await second.records()) == {identity(2).peer}
        async with start(1, tmp_path, port=port) as again:
            await again.advertise(record(identity(1), time.time() + 60), 60)
            await until(second, lambda found: set(found) == {identity(1).peer, identity(2).peer})
            await until(again, lambda found: set(found) == {identity(1).peer, identity(2).peer})
    finally:
        await joining.__aexit__(None, None, None)


@pytest.mark.parametrize("who_dies", ["nobody", "the bootstrap peer", "everybody else"])
async def test_a_kept_directory_comes_back_through_whoever_is_left(
    tmp_path: Path, who_dies: str
) -> None:
    """It joined through the first node only, or through nobody where it is the first itself."""
    others = AsyncExitStack()
    first = await others.enter_async_context(start(1, tmp_path))
    join = () if who_dies == "everybody else" else first.addresses

    def open_directory(port: int, neighbours: Sequence[str]) -> Any:
        return start(3, tmp_path, port=port, join=[*join, *neighbours])

    async with KeptDirectory.start(open_directory, 0, lambda _what, **_facts: None) as kept:
        through = kept.addresses if not join else first.addresses
        async with start(2, tmp_path, join=through) as second:
            mine = record(identity(2), time.time() + 60)
            await second.advertise(mine, 60)
            await until(kept, lambda found: found == {identity(2).peer: mine})
            if who_dies == "the bootstrap peer":
                await others.aclose()
            if who_dies != "everybody else":
                pid = await killed(kept)
                await until(kept, lambda found: found == {identity(2).peer: mine})
                assert kept.pid != pid
        await others.aclose()
        if who_dies == "everybody else":
            await killed(kept)
            ours = record(identity(3), time.time() + 60)
            await kept.advertise(ours, 60)
            assert await kept.records() == {identity(3).peer: ours}


async def killed(kept: KeptDirectory) -> int:
    """Kill the child; returns its process id once there is another one."""
    pid = kept.pid
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        while kept.pid == pid:  # noqa: ASYNC110 - other processes decide
            await asyncio.sleep(0.02)
    return pid


async def test_an_advert_that_is_not_renewed_goes_away(tmp_path: Path) -> None:
    async with start(1, tmp_path) as first, start(2, tmp_path, join=first.addresses) as second:
        await first.advertise(record(identity(1), time.time() + 60), 60)
        await second.advertise(record(identity(2), time.time() + 60), 1.0)
        await until(first, lambda found: set(found) == {identity(1).peer, identity(2).peer})
        await until(first, lambda found: set(found) == {identity(1).peer})


async def test_addresses_lead_to_the_identity(tmp_path: Path) -> None:
    suffix = f"/p2p/{identity(1).peer}"
    async with start(1, tmp_path) as local:
        assert [a.split("/")[2] for a in local.addresses] == ["127.0.0.1"]
        assert all(a.endswith(suffix) for a in local.addresses)
        assert not (tmp_path / "1" / "p2pd.key").exists()
    everywhere = Directory.start(identity(1), tmp_path / "1", "0.0.0.0")
    async with everywhere as public:
        hosts = [a.split("/")[2] for a in public.addresses]
        others = {
            address.address
            for addresses in psutil.net_if_addrs().values()
            for address in addresses
            if address.family.name == "AF_INET" and not address.address.startswith("127.")
        }
        assert others <= set(hosts)
        assert "127.0.0.1" not in hosts[: len(others)]
    announced = "/ip4/203.0.113.7/tcp/4001"
    async with start(1, tmp_path, announce=[announced]) as forwarded:
        assert forwarded.addresses == (announced + suffix,)


async def test_a_join_without_answer_is_a_lost_peer(tmp_path: Path) -> None:
    dead = f"/ip4/127.0.0.1/tcp/9/p2p/{identity(9).peer}"
    with pytest.raises(PeerLostError, match="no bootstrap peer answers") as caught:
        async with start(1, tmp_path, join=[dead]):
            pass
    assert caught.value.peer == dead


async def test_a_silent_network_is_given_up_in_time(tmp_path: Path) -> None:
    """A listener that accepts and never says a word, as behind a broken tunnel."""
    mute = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = mute.sockets[0].getsockname()[1]
    join = [f"/ip4/127.0.0.1/tcp/{port}/p2p/{identity(9).peer}"]
    started_s = time.monotonic()
    with pytest.raises(PeerLostError):
        async with start(1, tmp_path, join=join, start_timeout_s=4.0):
            pass
    assert time.monotonic() - started_s < 12
    mute.close()


@pytest.mark.parametrize("join", ["nonsense", "/ip4/127.0.0.1/tcp/1", "/ip4/1.1.1.1/tcp/1/p2p/Qm"])
async def test_a_mistyped_address_is_the_users_error(tmp_path: Path, join: str) -> None:
    with pytest.raises(UserError, match="is not an address of a node"):
        async with start(1, tmp_path, join=[join]):
            pass


async def test_a_port_in_use_is_busy(tmp_path: Path) -> None:
    async with start(1, tmp_path) as first:
        port = int(first.addresses[0].split("/")[4])
        with pytest.raises(BusyError, match=f"port {port}"):
            async with start(2, tmp_path, port=port):
                pass
    async with start(2, tmp_path, port=port) as second:
        assert int(second.addresses[0].split("/")[4]) == port


async def test_only_our_own_valid_advert_is_stored(tmp_path: Path) -> None:
    async with start(1, tmp_path) as directory:
        with pytest.raises(UserError, match="foreign"):
            await directory.advertise(record(identity(2), time.time() + 60), 60)
        with pytest.raises(UserError, match="schema"):
            await directory.advertise(b"junk", 60)
        assert await directory.records() == {}


@asynccontextmanager
async def hostile(home: Path, join: Sequence[str]) -> AsyncIterator[Callable[..., Any]]:
    """A node that checks nothing; the context is a function that stores (key, subkey, value)."""
    script = Path(__file__).with_name("hostile_node.py")
    child = spawn_child([sys.executable, str(script)], name="hostile", log=home / "hostile.log")
    try:
        (home / "bad").mkdir()
        arguments = {
            "key": identity(66).protobuf,
            "home": str(home / "bad"),
            "host": "127.0.0.1",
            "port": 0,
            "join": list(join),
            "announce": [],
            "limit_s": 20.0,
        }
        await child.send(msgpack.packb(arguments))
        await child.receive()

        async def store(key: str, subkey: Any, value: Any, ttl_s: float) -> Any:
            request = {"key": key, "subkey": subkey, "value": value, "ttl_s": ttl_s}
            await child.send(msgpack.packb(request))
            return msgpack.unpackb(await child.receive())

        yield store
    finally:
        await child.stop()


async def test_what_a_hostile_node_spreads_is_refused_and_counted(tmp_path: Path) -> None:
    now_s = time.time()
    mine, victim = record(identity(1), now_s + 60), record(identity(2), now_s + 60)
    broken = victim[:-1] + bytes([victim[-1] ^ 1])
    cases = [
        ("signature", KEY, identity(2).peer, broken, 50),
        ("foreign", KEY, identity(3).peer, victim, 50),
        ("foreign", "another.key", identity(2).peer, victim, 50),
        ("size", KEY, identity(4).peer, bytes(10_000), 50),
        ("schema", KEY, 7, victim, 50),
        ("schema", KEY, identity(2).peer, {"a": [1]}, 50),
        ("lease", KEY, identity(2).peer, victim, 500),
        ("lease", KEY, identity(5).peer, record(identity(5), now_s + 9999), 50),
    ]
    async with start(1, tmp_path) as first, hostile(tmp_path, first.addresses) as store:
        await first.advertise(mine, 60)
        before = 0
        for reason, *case in cases:
            answers = await store(*case)
            assert answers == [[False]], reason
            assert await first.records() == {identity(1).peer: mine}
            assert first.refused[reason] > 0
            assert sum(first.refused.values()) > before
            before = sum(first.refused.values())
        assert set(first.refused) == {reason for reason, *_ in cases}
        # a true advert may come by anybody
        async with start(2, tmp_path, join=first.addresses) as second:
            await second.advertise(victim, 60)
            await until(
                first, lambda found: found == {identity(1).peer: mine, identity(2).peer: victim}
            )


async def test_a_flood_of_signed_adverts_displaces_nobody_who_is_known(tmp_path: Path) -> None:
    until_s = time.time() + 60
    flood = {identity(n).peer: record(identity(n), until_s) for n in range(10, 60 + MAX_PEERS)}
    known = sorted(flood)[-20:]
    async with start(1, tmp_path) as first, hostile(tmp_path, first.addresses) as store:
        await first.advertise(record(identity(1), until_s), 60)
        await store(KEY, None, flood, 50)
        async with asyncio.timeout(30):
            while len(found := await first.records(known)) < MAX_PEERS:
                pass
        assert len(found) == MAX_PEERS
        assert list(found)[:21] == [identity(1).peer, *known]
        assert len(set(found) - set(flood)) == 1


@pytest.mark.parametrize("answer", ["struct.pack('>I', 0xFFFFFFFF)", "framed(b'nonsense')"])
async def test_a_child_that_breaks_the_protocol_is_ended_and_started_again(answer: str) -> None:
    """The first life answers with `answer` and would live on; the next one as it should."""
    broken = (
        "import os, socket, struct\n"
        "sock = socket.socket(fileno=int(os.environ['SWARMNODE_PIPE_FD']))\n"
        "framed = lambda body: struct.pack('>I', len(body)) + body\n"
        "sock.recv(1 << 16)\n"
        f"sock.sendall({answer})\n"
        "while sock.recv(1 << 16): pass\n"
    )
    sound = (
        "import msgpack\n"
        "from swarmnode.children import ChildPipe\n"
        "pipe = ChildPipe.inherit()\n"
        "while True:\n"
        "    number = msgpack.unpackb(pipe.receive())['number']\n"
        "    answer = {'number': number, 'records': {}, 'refused': {}, 'neighbours': []}\n"
        "    pipe.send(msgpack.packb(answer))\n"
    )
    lives = iter([broken, sound])

    @asynccontextmanager
    async def open_directory(_port: int, _neighbours: Sequence[str]) -> AsyncIterator[Directory]:
        child = spawn_child([sys.executable, "-c", next(lives)], name="directory")
        try:
            yield Directory(child, ["/ip4/127.0.0.1/tcp/4001/p2p/somebody"], timeout_s=10)
        finally:
            await child.stop(0.0)

    async with KeptDirectory.start(open_directory, 0, lambda _what, **_facts: None) as kept:
        pid = kept.pid
        with pytest.raises(ChildError):
            await kept.records()
        async with asyncio.timeout(20):
            while kept.pid == pid:  # noqa: ASYNC110 - other processes decide
                await asyncio.sleep(0.02)
        assert await kept.records() == {}


async def test_the_go_daemon_dies_with_its_killed_child(tmp_path: Path) -> None:
    async with start(1, tmp_path) as directory:
        child = psutil.Process(directory.pid)
        daemon = go_daemon(directory.pid)
        waiting = asyncio.ensure_future(directory.wait())
        daemon.suspend()  # it cannot notice anything itself: only the kernel can end it
        child.kill()
        await until_gone(child, daemon)
        with pytest.raises(ChildError, match="SIGKILL"):
            await directory.records()
        with pytest.raises(ChildError, match="-9"):
            await waiting
    async with start(1, tmp_path) as again:  # the home of a killed run is no obstacle
        assert await again.records() == {}


async def test_nothing_survives_the_killed_daemon(tmp_path: Path) -> None:
    code = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from swarmnode.p2p.directory import Directory\n"
        "from swarmnode.p2p.identity import Identity\n"
        "async def main():\n"
        "    home = Path(sys.argv[1])\n"
        "    async with Directory.start(Identity(bytes(32)), home, '127.0.0.1') as directory:\n"
        "        print(directory.pid, flush=True)\n"
        "        await directory.wait()\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    child = psutil.Process(int(await parent.stdout.readline()))
    daemon = go_daemon(child.pid)
    daemon.suspend()  # neither can notice anything: only the kernel can end them
    child.suspend()
    parent.kill()
    await parent.wait()
    await until_gone(child, daemon)


async def test_stopping_leaves_no_process_and_no_socket(tmp_path: Path) -> None:
    async with start(1, tmp_path) as directory:
        family = [psutil.Process(directory.pid), go_daemon(directory.pid)]
    await until_gone(*family)
    assert list((tmp_path / "1" / "sockets").iterdir()) == []
    assert (tmp_path / "1" / "directory.log").read_text() == ""


async def test_the_child_is_small_and_has_no_torch(tmp_path: Path) -> None:
    async with start(1, tmp_path) as directory:
        child = psutil.Process(directory.pid)
        assert not any("torch" in mapped.path for mapped in child.memory_maps())
        assert child.memory_info().rss < 100 << 20
        assert go_daemon(directory.pid).memory_info().rss < 150 << 20
