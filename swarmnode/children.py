"""Child processes of ours: one socketpair each, framed messages, and none outlives its parent.

On Linux the kernel kills the child when the parent thread that started it dies (see leash.py), so
spawn from a thread that lives as long as the daemon: the main one. Elsewhere the child watches
its parent. The child's side is `ChildPipe` or `Pipe`, in pipes.py.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from swarmnode import leash
from swarmnode.errors import ChildError, FrameTooLargeError
from swarmnode.pipes import (
    FD_VARIABLE,
    MAX_MESSAGE_BYTES,
    PARENT_VARIABLE,
    Buffer,
    ChildPipe,
    Pipe,
)

__all__ = [
    "Child",
    "ChildPipe",
    "Pipe",
    "kill_and_reap",
    "leashed",
    "open_log",
    "python_module",
    "spawn_child",
]

KILLED_S = 5.0
"""A process that has not ended so long after SIGKILL sleeps in a driver: nobody waits for it."""
_REAP_S = 5.0
_LOOK_S = 0.05
_log = logging.getLogger(__name__)
_MAX_LOG_BYTES = 4 << 20
_TAIL_BYTES = 2048


def python_module(module: str, *args: str) -> list[str]:
    """The argv that runs a module of ours in a fresh interpreter."""
    return [sys.executable, "-m", module, *args]


def leashed(argv: Sequence[str]) -> list[str]:
    """`argv` behind the small program that ties its life to this process."""
    return [sys.executable, "-I", "-S", leash.__file__, str(os.getpid()), *argv]


class Process(Protocol):
    """What a Child needs of its process: a `subprocess.Popen`, or a fork of somebody else's."""

    pid: int

    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def terminate(self) -> None: ...


async def exit_status(process: Process) -> int:
    """Wait for the end of a process; the exit status, or minus the signal that killed it."""
    if process.poll() is None:
        await _until_exit(process.pid)
    # no pidfd here, or a debugger holds it
    while (status := process.poll()) is None:  # noqa: ASYNC110 - nothing else tells
        await asyncio.sleep(_LOOK_S)
    return status


async def _until_exit(pid: int) -> None:
    """Return when a process has ended, or at once where that cannot be waited for."""
    try:
        pidfd = os.pidfd_open(pid)
    except (AttributeError, OSError):  # not Linux, or not permitted
        return
    loop = asyncio.get_running_loop()
    exited = asyncio.Event()
    loop.add_reader(pidfd, exited.set)
    try:
        await exited.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


async def kill_and_reap(process: Process, name: str) -> int:
    """SIGKILL a process, if it lives; how it ended, as `exit_status` tells it.

    One that sleeps in a driver may not end for long. After KILLED_S, or when this is cancelled, it
    is let go of, counts as killed, and is reaped once it has ended.
    """
    process.kill()
    try:
        async with asyncio.timeout(KILLED_S):
            return await exit_status(process)
    except TimeoutError:
        _log.warning("%s was killed and does not end: process %d", name, process.pid)
        return -signal.SIGKILL
    finally:
        _reap_later(process)


def _reap_later(process: Process) -> None:
    if process.poll() is None:
        asyncio.get_running_loop().call_later(_REAP_S, _reap_later, process)


class Child:
    """A running child process and our end of its pipe."""

    def __init__(
        self,
        process: Process,
        pipe: Pipe,
        name: str,
        log: Path | None,
        log_start: int,
    ) -> None:
        self._process = process
        self._pipe = pipe
        self._log = log
        self._log_start = log_start
        self.name = name

    @property
    def pid(self) -> int:
        return self._process.pid

    async def send(self, *parts: Buffer) -> None:
        """Send one message; waits while the child does not read. Raises: ChildError."""
        try:
            await self._pipe.send(*parts)
        except (OSError, EOFError) as error:
            raise await self._ended() from error

    async def receive(self) -> bytearray:
        """Return the child's next message. May be cancelled and called again.

        Raises: ChildError if the child ended. One that announces too much is killed: what would
        follow of that message could not be told from the next one.
        """
        try:
            return await self._pipe.receive()
        except FrameTooLargeError as error:
            self.kill()
            raise ChildError(f"{self.name} is killed: {error}") from error
        except (OSError, EOFError) as error:
            raise await self._ended() from error

    async def wait(self) -> int:
        """Wait for the end; the exit status, or minus the signal that killed it."""
        return await exit_status(self._process)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL it, if it lives; whoever waits for its next message hears of its end."""
        self._process.kill()

    async def close(self) -> None:
        """SIGKILL it, if it lives, and let go of it: for a child that has nothing to finish."""
        self._pipe.close()
        await kill_and_reap(self._process, self.name)

    async def stop(self, grace_s: float = 5.0) -> int:
        """End the child: end of file, after half of `grace_s` SIGTERM, after all of it SIGKILL.

        Idempotent. Returns the exit status as `wait` does; see `kill_and_reap` for one that does
        not end even then.
        """
        self._pipe.close_write()
        try:
            for ask in (None, self._process.terminate):
                if ask is not None:
                    ask()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(grace_s / 2):
                        await self.wait()
                        break
        finally:  # also when cancelled: nothing is left behind
            self._pipe.close()
            status = await kill_and_reap(self._process, self.name)
        return status

    async def _ended(self) -> ChildError:
        try:
            async with asyncio.timeout(2.0):
                status = await self.wait()
        except TimeoutError:
            return ChildError(f"{self.name} closed its pipe but still runs")
        how = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
        lines = _last_lines(self._log, self._log_start)
        return ChildError(f"{self.name} ended with {how}" + (f": {lines}" if lines else ""))


def spawn_child(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    name: str,
    log: Path | None = None,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> Child:
    """Start a child of ours with one end of a socketpair; it dies with this thread.

    `env` adds to the inherited environment. stderr and stdout are appended to `log` (emptied
    first if it has grown over 4 MiB), or forwarded to our own if None.
    Call `Child.stop` in the end, always. Raises: ChildError if it cannot be started.
    """
    ours, theirs = socket.socketpair()
    variables = {
        **os.environ,
        **(env or {}),
        FD_VARIABLE: str(theirs.fileno()),
        PARENT_VARIABLE: str(os.getpid()),
    }
    with theirs, contextlib.ExitStack() as opened:
        try:
            output = opened.enter_context(open_log(log)) if log is not None else None
            log_start = output.tell() if output is not None else 0
            process = subprocess.Popen(
                leashed(argv),
                env=variables,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        except OSError as error:
            ours.close()
            raise ChildError(f"cannot start {name}: {error}") from error
    return Child(process, Pipe(ours, max_message_bytes=max_message_bytes), name, log, log_start)


def open_log(log: Path) -> BinaryIO:
    """Where a child's words go: appended, after emptying a file that has grown too long."""
    log.parent.mkdir(parents=True, exist_ok=True)
    file = log.open("ab")
    if file.tell() > _MAX_LOG_BYTES:
        file.truncate(0)
    return file


def _last_lines(log: Path | None, start: int) -> str:
    """The last three lines after `start`, joined, at most 2 KiB; empty if there are none."""
    if log is None:
        return ""
    try:
        with log.open("rb") as file:
            file.seek(max(start, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return " | ".join(line.strip() for line in text.splitlines()[-3:] if line.strip())
