"""Worker children that have their libraries at once: importing torch takes seconds, a fork none.

The first job that a node is asked about brings a process that imports torch and does nothing else
(engine/nursery.py); every worker child is a fork of it. KEEP_S after its last job it ends.
"""

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from swarmnode.children import (
    Child,
    kill_and_reap,
    leashed,
    open_log,
    python_module,
    spawn_child,
)
from swarmnode.errors import ChildError
from swarmnode.pipes import Pipe
from swarmnode.worker.engine.nursery import BORN, RECORD

START_S = 1.0
"""A node that was only asked about a job begins to import after so long: who works goes first."""
KEEP_S = 300.0
"""So long after its last job, or after it was asked about one, a node keeps its nursery."""
BIRTH_S = 90.0
"""For the import and the fork; who waits longer gets a child the slow way."""
_REAP_S = 1.0


class Nursery:
    """Gives worker children; one waits already wherever there are jobs.

    Use it in the thread that children live with, on one event loop. While `run` does not run,
    each child is a fresh process.
    """

    def __init__(self, num_threads: int, log: Path) -> None:
        """`log` is where the children's words go."""
        self._env = {
            "OMP_NUM_THREADS": str(num_threads),
            "OPENBLAS_NUM_THREADS": "1",  # numpy would start threads on import
            "TOKENIZERS_PARALLELISM": "0",
        }
        self._log = log
        self._forks: _Forks | None = None
        self._waiting: Child | None = None
        self._runs = False
        self._num_jobs = 0
        self._kept_until_s = 0.0
        self._called = asyncio.Event()
        self._tried = asyncio.Event()

    @contextlib.contextmanager
    def wanted(self) -> Iterator[None]:
        """While a job is worked for or asked about, and KEEP_S longer, a child is to wait."""
        loop = asyncio.get_running_loop()
        self._num_jobs += 1
        loop.call_later(START_S, self._called.set)
        try:
            yield
        finally:
            self._num_jobs -= 1
            self._kept_until_s = time.monotonic() + KEEP_S
            loop.call_later(KEEP_S, self._called.set)

    async def child(self, name: str) -> Child:
        """A child for one job. If cancelled, none is lost. Raises: ChildError."""
        if self._runs and not self._is_child_waiting:
            self._kept_until_s = max(self._kept_until_s, time.monotonic() + BIRTH_S)
            self._tried.clear()
            self._called.set()
            await self._tried.wait()
        child, self._waiting = self._waiting, None
        self._called.set()
        if child is None or not child.is_alive:
            child = spawn_child(
                python_module("swarmnode.worker.engine"), env=self._env, name=name, log=self._log
            )
        child.name = name
        return child

    async def run(self) -> None:
        """Have a child wait while it is wanted, until cancelled."""
        self._runs = True
        try:
            while True:
                await self._called.wait()
                self._called.clear()
                if self._num_jobs or time.monotonic() < self._kept_until_s:
                    await self._fill()
                else:
                    await self._drop()
                self._tried.set()
        finally:
            self._runs = False
            self._tried.set()
            await self._drop()

    @property
    def _is_child_waiting(self) -> bool:
        return self._waiting is not None and self._waiting.is_alive

    async def _fill(self) -> None:
        if self._is_child_waiting:
            return
        dead, self._waiting = self._waiting, None
        if dead is not None:
            await dead.close()
        try:
            if self._forks is None:
                self._forks = _Forks(self._env, self._log)
            self._waiting = await self._forks.fork()
        except ChildError:
            return
        except (OSError, TimeoutError):  # it was killed, perhaps; the next one may do better
            await self._drop()

    async def _drop(self) -> None:
        waiting, self._waiting = self._waiting, None
        forks, self._forks = self._forks, None
        try:
            if waiting is not None:
                await waiting.close()
        finally:
            if forks is not None:
                await forks.close()


class _Forks:
    """The process that forks. Raises: OSError once it is dead."""

    def __init__(self, env: dict[str, str], log: Path) -> None:
        self._log = log
        self._born: list[int] = []
        self._statuses: dict[int, int] = {}
        self._is_dead = False
        self._heard = asyncio.Event()
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.setblocking(False)
        with theirs, open_log(log) as output:
            self._process = subprocess.Popen(
                leashed(python_module("swarmnode.worker.engine.nursery")),
                env={**os.environ, **env},
                stdin=theirs.fileno(),
                stdout=output,
                stderr=output,
            )
        asyncio.get_running_loop().add_reader(self._sock, self._read)

    async def fork(self) -> Child:
        """A child. Raises: TimeoutError, and ChildError if only this fork failed."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self._sock, [b"f"], [theirs.fileno()])
            async with asyncio.timeout(BIRTH_S):
                while not self._born:
                    if self._is_dead:
                        raise ConnectionResetError("the nursery has ended")
                    self._heard.clear()
                    await self._heard.wait()
            if not (pid := self._born.pop()):
                raise ChildError("the nursery cannot fork")
            process = _Fork(pid, self)
        except BaseException:
            ours.close()
            raise
        return Child(process, Pipe(ours), "a worker child", self._log, self._log.stat().st_size)

    def status_of(self, pid: int) -> int:
        """How a child has ended that is dead."""
        while pid not in self._statuses and not self._is_dead:
            if not select.select([self._sock], [], [], _REAP_S)[0]:
                break
            self._read()
        return self._statuses.pop(pid, -signal.SIGKILL)  # it died with the nursery

    async def close(self) -> None:
        self._end()
        self._sock.close()
        await kill_and_reap(self._process, "the nursery")

    def _read(self) -> None:
        """Take one record, whoever waits for it."""
        try:
            record = self._sock.recv(RECORD.size)
        except BlockingIOError:
            return
        except OSError:
            record = b""
        if len(record) != RECORD.size:
            self._end()
            return
        pid, status = RECORD.unpack(record)
        if status == BORN:
            self._born.append(pid)
        else:
            self._statuses[pid] = status
        self._heard.set()

    def _end(self) -> None:
        if not self._is_dead:
            self._is_dead = True
            asyncio.get_running_loop().remove_reader(self._sock)
            self._heard.set()


class _Fork:
    """A process that the nursery has forked: what `Child` needs of a process."""

    def __init__(self, pid: int, forks: _Forks) -> None:
        """Raises: OSError if it is dead already."""
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._forks = forks
        self._status: int | None = None

    def poll(self) -> int | None:
        """The exit status as `subprocess` tells it; None while it lives."""
        if self._status is None and select.select([self._pidfd], [], [], 0)[0]:
            self._end()
        return self._status

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _end(self) -> None:
        self._status = self._forks.status_of(self.pid)
        os.close(self._pidfd)
