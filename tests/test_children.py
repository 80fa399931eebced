"""Child processes: messages arrive whole, and no child outlives its parent."""

import asyncio
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from swarmnode import children
from swarmnode.children import Child, ChildPipe, Pipe, spawn_child
from swarmnode.errors import ChildError, FrameTooLargeError

ECHO = """
from swarmnode.children import ChildPipe
pipe = ChildPipe.inherit()
while True:
    try:
        message = pipe.receive()
    except EOFError:
        break
    pipe.send(message[:1], message[1:])
"""


@asynccontextmanager
async def child_of(code: str, log: Path | None = None) -> AsyncIterator[Child]:
    child = spawn_child([sys.executable, "-c", code], name="child", log=log)
    try:
        yield child
    finally:
        await child.stop(1.0)


async def until_gone(pid: int, timeout_s: float = 10.0) -> None:
    """Wait for the end of any process, a stranger's too; fails if it lives on."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    gone = asyncio.Event()
    asyncio.get_running_loop().add_reader(pidfd, gone.set)
    try:
        async with asyncio.timeout(timeout_s):
            await gone.wait()
    finally:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)


async def test_messages_of_any_size_come_back_whole_and_in_order() -> None:
    async with child_of(ECHO) as child:
        for num_bytes in (1, 2, 65_536, 64 << 20):
            message = os.urandom(min(num_bytes, 1 << 20)) * max(1, num_bytes >> 20)
            half = len(message) // 2
            async with asyncio.TaskGroup() as group:
                group.create_task(child.send(message[:half], memoryview(message)[half:]))
                answer = group.create_task(child.receive())
            assert answer.result() == message


async def test_many_parts_are_one_message() -> None:
    async with child_of(ECHO) as child:
        await child.send(*(bytes([number % 256]) * number for number in range(300)))
        answer = await child.receive()
        assert answer == b"".join(bytes([number % 256]) * number for number in range(300))


async def test_a_child_ends_by_itself_when_its_pipe_ends() -> None:
    child = spawn_child([sys.executable, "-c", ECHO], name="echo")
    assert await child.stop(20.0) == 0
    assert await child.stop(20.0) == 0


async def test_a_deaf_child_is_killed_after_its_grace() -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + ECHO.replace(
        "break", "time.sleep(600)"
    )
    async with child_of(code) as child:
        await child.send(b"ready?")
        assert await child.receive() == b"ready?"
        assert await child.stop(0.2) == -signal.SIGKILL


class Undying(subprocess.Popen[bytes]):
    """Stays when it is killed, like a process that sleeps in a driver."""

    was_killed = False

    def kill(self) -> None:
        self.was_killed = True

    def terminate(self) -> None:
        pass


@pytest.mark.parametrize("how", ["stop", "close", "a stop that is cancelled"])
async def test_a_child_that_does_not_end_when_killed_is_let_go_of_and_reaped_later(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If anybody waited for it on the loop, it would have ended by itself when the call returns."""
    monkeypatch.setattr(children, "KILLED_S", 600.0 if "cancelled" in how else 0.1)
    monkeypatch.setattr(children, "_REAP_S", 0.01)
    process = Undying([sys.executable, "-c", "import time; time.sleep(20)"])
    ours, theirs = socket.socketpair()
    with theirs:
        child = Child(process, Pipe(ours), "the sleeper", None, 0)
        ending = asyncio.ensure_future(child.close() if how == "close" else child.stop(0.0))
        if "cancelled" in how:
            async with asyncio.timeout(10):
                while not process.was_killed:  # noqa: ASYNC110 - a signal has no event
                    await asyncio.sleep(0)
            ending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await ending
        else:
            assert await ending == (None if how == "close" else -signal.SIGKILL)
            assert f"the sleeper was killed and does not end: process {child.pid}" in caplog.text
        assert process.was_killed
        assert child.is_alive
        os.kill(child.pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            while process.returncode is None:  # noqa: ASYNC110 - nobody tells when it is reaped
                await asyncio.sleep(0.01)
        assert process.returncode == -signal.SIGKILL


async def test_a_child_is_waited_for_where_there_is_no_pidfd(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    async with child_of(ECHO) as child:
        waiting = asyncio.ensure_future(child.wait())
        await child.send(b"still here?")
        assert await child.receive() == b"still here?"
        assert not waiting.done()
        assert await child.stop(20.0) == 0
        assert await waiting == 0


async def test_the_error_of_a_dead_child_tells_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "child.log"
    async with child_of("raise RuntimeError('first')", log) as child:
        await child.wait()
    async with child_of("raise ValueError('the tank is empty')", log) as child:
        with pytest.raises(ChildError, match=r"status 1.*the tank is empty") as caught:
            await child.receive()
        assert "first" not in str(caught.value)
        with pytest.raises(ChildError, match="the tank is empty"):
            await child.send(b"x" * (32 << 20))
    assert "first" in log.read_text()


async def test_a_killed_child_is_reported_by_its_signal() -> None:
    async with child_of(ECHO) as child:
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(ChildError, match="SIGKILL"):
            await child.receive()
        assert await child.wait() == -signal.SIGKILL


async def test_a_program_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    child = spawn_child(["/no/such/program"], name="ghost", log=tmp_path / "log")
    with pytest.raises(ChildError, match="status 1: cannot run /no/such/program"):
        await child.receive()
    await child.stop()


async def test_an_announced_giant_is_refused_before_it_is_read() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        pipe = Pipe(ours, max_message_bytes=1000)
        theirs.sendall(struct.pack(">I", 1001))
        with pytest.raises(FrameTooLargeError, match="1001 bytes announced, at most 1000"):
            await pipe.receive()
        pipe.close()
    ours, theirs = socket.socketpair()
    with theirs:
        blocking = ChildPipe(ours, max_message_bytes=1000)
        theirs.sendall(struct.pack(">I", 0xFFFFFFFF))
        with pytest.raises(FrameTooLargeError):
            blocking.receive()
        blocking.close()


async def test_a_child_that_announces_a_giant_is_killed() -> None:
    code = (
        "import os, socket, struct\n"
        "sock = socket.socket(fileno=int(os.environ['SWARMNODE_PIPE_FD']))\n"
        "sock.sendall(struct.pack('>I', 0xFFFFFFFF))\n"
        "while True: sock.sendall(bytes(1 << 20))\n"
    )
    async with child_of(code) as child:
        with pytest.raises(ChildError, match="is killed: message of 4294967295 bytes"):
            await child.receive()
        assert await child.wait() == -signal.SIGKILL


async def test_a_cancelled_receive_loses_nothing() -> None:
    ours, theirs = socket.socketpair()
    pipe = Pipe(ours)
    frame = struct.pack(">I", 6) + b"abcdef" + struct.pack(">I", 1) + b"z"
    with theirs:
        for position in range(len(frame)):
            task = asyncio.ensure_future(pipe.receive())
            await asyncio.sleep(0)
            theirs.sendall(frame[position : position + 1])
            if position == 9:
                assert await task == b"abcdef"
            elif position == len(frame) - 1:
                assert await task == b"z"
            else:
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        pipe.close()


async def test_a_cancelled_send_is_finished_by_the_next_one() -> None:
    ours, theirs = socket.socketpair()
    sender, receiver = Pipe(ours), Pipe(theirs)
    large = os.urandom(32 << 20)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await sender.send(large)
    async with asyncio.TaskGroup() as group:
        group.create_task(sender.send(b"next"))
        assert await receiver.receive() == large
        assert await receiver.receive() == b"next"
    sender.close()
    receiver.close()


async def test_closing_a_pipe_wakes_who_waits_on_it() -> None:
    ours, theirs = socket.socketpair()
    pipe = Pipe(ours)
    with theirs:
        task = asyncio.ensure_future(pipe.receive())
        await asyncio.sleep(0)
        pipe.close()
        with pytest.raises((EOFError, OSError)):
            await task


def test_threads_of_a_child_do_not_mix_their_messages() -> None:
    ours, theirs = socket.socketpair()
    writer, reader = ChildPipe(ours), ChildPipe(theirs)
    threads = [
        threading.Thread(target=lambda b=bytes([n]): [writer.send(b, b * 9999) for _ in range(20)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    messages = [reader.receive() for _ in range(80)]
    for thread in threads:
        thread.join()
    assert {len(message) for message in messages} == {10_000}
    assert {len(set(message)) for message in messages} == {1}
    writer.close()
    with pytest.raises(EOFError):
        reader.receive()
    reader.close()


def test_a_module_started_by_hand_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SWARMNODE_PIPE_FD", raising=False)
    with pytest.raises(ChildError, match="started by the daemon"):
        ChildPipe.inherit()


async def test_pipes_work_under_uvloop() -> None:
    code = (
        "import asyncio, sys, uvloop\n"
        "from swarmnode.children import spawn_child\n"
        "async def main():\n"
        f"    child = spawn_child([sys.executable, '-c', {ECHO!r}], name='echo')\n"
        "    message = b'x' * (16 << 20)\n"
        "    async with asyncio.TaskGroup() as group:\n"
        "        group.create_task(child.send(message))\n"
        "        answer = group.create_task(child.receive())\n"
        "    assert answer.result() == message\n"
        "    assert await child.stop() == 0\n"
        "uvloop.run(main())\n"
    )
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.processes
async def test_a_busy_child_dies_with_its_killed_parent() -> None:
    busy = (
        "from swarmnode.children import ChildPipe\nChildPipe.inherit().send(b'up')\nwhile 1: pass"
    )
    parent_code = (
        "import asyncio, sys\n"
        "from swarmnode.children import spawn_child\n"
        "async def main():\n"
        f"    child = spawn_child([sys.executable, '-c', {busy!r}], name='busy')\n"
        "    await child.receive()\n"
        "    print(child.pid, flush=True)\n"
        "    await child.wait()\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", parent_code, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    child_pid = int(await parent.stdout.readline())
    assert psutil.Process(child_pid).ppid() == parent.pid
    parent.kill()
    await parent.wait()
    await until_gone(child_pid)


@pytest.mark.processes
async def test_a_child_born_to_a_dead_parent_never_starts(tmp_path: Path) -> None:
    from swarmnode import leash

    never = tmp_path / "never"
    argv = [sys.executable, "-I", "-S", leash.__file__, "1", "/usr/bin/touch", str(never)]
    done = await asyncio.to_thread(subprocess.run, argv)
    assert done.returncode == 1
    assert not never.exists()
