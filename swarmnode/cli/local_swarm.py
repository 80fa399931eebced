"""Several daemons as processes on this machine's loopback: the base of the demo and of tests."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import psutil

from swarmnode.children import leashed, python_module
from swarmnode.cli.client import NodeClient
from swarmnode.config import HTTP_FILE, LOG_FILE
from swarmnode.errors import ChildError, NotFoundError, SwarmError
from swarmnode.http.api import PeerView

START_S = 90.0
STOP_S = 15.0
OUTPUT_FILE = "output.log"
Part = Literal["worker", "directory"]
"""Children of a daemon."""
_MARK = "LOCAL_SWARM_NODE"
"""In the environment of every process of a node: which swarm and node it belongs to."""
_TAIL_LINES = 12
_TAIL_BYTES = 16 << 10
_LOOK_S = 0.05


class LocalNode:
    """One daemon: its home, its process and a client that speaks to it."""

    def __init__(self, index: int, home: Path, args: Sequence[str]) -> None:
        self.index = index
        self.home = home
        self._args = tuple(args)
        self._process: subprocess.Popen[bytes] | None = None
        self._client: NodeClient | None = None
        self.variables: dict[str, str] = {}
        """In the environment of lives to come, beside ours: where a test arms a failpoint."""
        self.was_killed = False
        self.has_failed = False
        """Whether it ended although nobody asked."""

    @property
    def mark(self) -> str:
        return str(self.home)

    @property
    def client(self) -> NodeClient:
        """Speaks to this life of the daemon. Raises: NotFoundError before it is ready."""
        if self._client is None:
            self._client = NodeClient.of_home(self.home)
        return self._client

    def spawn(self, *args: str) -> None:
        """Start the process; call it from a thread that lives as long as the daemon should."""
        assert self._process is None, "one life at a time"
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.home / HTTP_FILE).unlink(missing_ok=True)  # of an earlier life that was killed
        kept = {k: v for k, v in os.environ.items() if not k.upper().startswith("SWARMNODE_")}
        argv = python_module("swarmnode.cli.main", "up", "--home", str(self.home))
        with (self.home / OUTPUT_FILE).open("ab") as output:
            self._process = subprocess.Popen(
                leashed([*argv, *self._args, *args]),
                env={**kept, **self.variables, _MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for us; we stop it in order
            )
        self.was_killed = False

    def is_ready(self) -> bool:
        """Whether it answers. Raises: ChildError, with the end of its log, if it has ended."""
        self.check()
        try:
            self.client.node()
        except NotFoundError:
            self.drop_client()
            return False
        return True

    def check(self) -> None:
        """Raises: ChildError, with the end of its log, if it has ended although nobody asked."""
        status = None if self._process is None else self._process.poll()
        if status is not None and not self.was_killed:
            self.has_failed = True
            raise ChildError(f"node {self.index} ended with status {status}: {self.last_words()}")

    def last_words(self) -> str:
        """What the daemon printed last, on one line; it ends with its error if there was one."""
        lines = _tail(self.home / OUTPUT_FILE).splitlines()
        return " | ".join(line.strip() for line in lines[-3:]) or "it printed nothing"

    def log_tail(self) -> str:
        """The end of what it printed and of its log file."""
        return "\n".join(filter(None, map(_tail, (self.home / LOG_FILE, self.home / OUTPUT_FILE))))

    def processes(self) -> list[psutil.Process]:
        """Everything alive that this node started, itself included."""
        return _marked(lambda mark: mark == self.mark)

    def kill(self) -> None:
        """SIGKILL the daemon and everything it started; returns when all are gone."""
        self.was_killed = True
        deadline_s = time.monotonic() + STOP_S
        while processes := self.processes():
            if time.monotonic() > deadline_s:
                raise SwarmError(f"node {self.index}: {len(processes)} processes survive SIGKILL")
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            time.sleep(_LOOK_S)
        self.forget()

    def child(self, part: Part, job: str = "") -> psutil.Process | None:
        """The process that computes for a job, for `job` if it is named, or the directory; None if
        there is none."""
        with contextlib.suppress(SwarmError, psutil.Error):
            for role, pid in self.client.node().pids.items():
                kind, _, whose = role.partition(":")
                if kind == part and job in ("", whose):
                    return psutil.Process(pid)
        return None

    def kill_child(self, part: Part, job: str = "") -> bool:
        """SIGKILL one child process; False if there is none."""
        process = self.child(part, job)
        if process is not None:
            with contextlib.suppress(psutil.Error):
                process.kill()
                return True
        return False

    def ask_to_stop(self) -> None:
        """SIGTERM to the daemon."""
        self.was_killed = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def wait_stopped(self, timeout_s: float) -> int | None:
        """The exit status after `ask_to_stop`; None if it still runs."""
        if self._process is None:
            return 0
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        self.forget()
        return status

    def forget(self) -> None:
        """The process is gone: reap it; `spawn` may be called again."""
        if self._process is not None:
            self._process.wait()
            self._process = None
        self.drop_client()

    def drop_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


class LocalSwarm:
    """`num_nodes` daemons, homes `root`/node-0 and so on; the others join node 0.

    Use it as a context manager, or call `stop` in the end, always. Should this process be killed,
    the daemons die with it; so start nodes from a thread that lives long enough: the main one.
    """

    def __init__(
        self, root: Path, num_nodes: int, *, threads: int = 1, extra_args: Sequence[str] = ()
    ) -> None:
        self.root = root.absolute()
        args = ("--host", "127.0.0.1", "--threads", str(threads), *extra_args)
        self.nodes = tuple(
            LocalNode(index, self.root / f"node-{index}", args) for index in range(num_nodes)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def node(self, index: int) -> LocalNode:
        return self.nodes[index]

    def start(self, timeout_s: float = START_S) -> None:
        """Start every node; returns when the first one sees all. Raises: ChildError, SwarmError."""
        deadline_s = time.monotonic() + timeout_s
        self.start_node(0, timeout_s=timeout_s)
        join = self.nodes[0].client.node().join_address
        for node in self.nodes[1:]:
            node.spawn("--join", join)
        for node in self.nodes[1:]:
            self._until(node.is_ready, deadline_s, f"node {node.index} does not get ready")
        self.wait_for_peers(len(self.nodes), timeout_s=deadline_s - time.monotonic())

    def start_node(self, index: int, *args: str, timeout_s: float = START_S) -> None:
        """Start one node, or start it again on its old home; returns when it answers."""
        node = self.nodes[index]
        node.spawn(*args)
        deadline_s = time.monotonic() + timeout_s
        self._until(node.is_ready, deadline_s, f"node {index} does not get ready")

    def wait_for_peers(
        self, num_peers: int, *, seen_by: int = 0, timeout_s: float = START_S
    ) -> tuple[PeerView, ...]:
        """Who node `seen_by` sees, once these are exactly `num_peers`. Raises: SwarmError."""
        client = self.nodes[seen_by].client
        seen: tuple[PeerView, ...] = ()

        def complete() -> bool:
            nonlocal seen
            self.check()
            seen = client.peers()
            return len(seen) == num_peers

        what = f"node {seen_by} does not see {num_peers} peers"
        self._until(complete, time.monotonic() + timeout_s, what)
        return seen

    def index_of(self, peer: str) -> int:
        """Which running node has that peer id. Raises: NotFoundError."""
        for node in self.nodes:
            if not node.was_killed and node.client.node().peer == peer:
                return node.index
        raise NotFoundError(f"no node of this swarm is peer {peer}")

    def kill(self, index: int) -> None:
        """SIGKILL node `index` and everything it started; returns when all are gone."""
        self.nodes[index].kill()

    def check(self) -> None:
        """Raises: ChildError, with the end of its log, if a node ended although nobody asked."""
        for node in self.nodes:
            node.check()

    def pids(self) -> list[int]:
        """Every living process of the swarm, whoever its parent is by now."""
        marks = {node.mark for node in self.nodes}
        return sorted(process.pid for process in _marked(marks.__contains__))

    def stop(self, timeout_s: float = STOP_S) -> None:
        """End every node, in order if it listens and by SIGKILL if not. Idempotent.

        Raises: SwarmError in the end if a daemon had to be killed or left a process behind.
        """
        deadline_s = time.monotonic() + timeout_s
        stubborn = []
        try:
            for node in self.nodes:
                node.ask_to_stop()
            for node in self.nodes:
                if node.wait_stopped(max(0.0, deadline_s - time.monotonic())) is None:
                    stubborn.append(f"node {node.index} ignores SIGTERM")
                elif node.processes():
                    stubborn.append(f"node {node.index} left a process behind")
        finally:
            for node in self.nodes:
                node.kill()
        if stubborn:
            raise SwarmError("; ".join(stubborn))

    def _until(self, holds: Callable[[], bool], deadline_s: float, what: str) -> None:
        while not holds():
            if time.monotonic() > deadline_s:
                raise SwarmError(f"{what} in time; see the logs under {self.root}")
            time.sleep(_LOOK_S)


def _marked(belongs: Callable[[str], bool]) -> list[psutil.Process]:
    """Living processes whose mark `belongs`; a mark is inherited, so none can slip away."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            mark = process.environ().get(_MARK)
            alive = process.status() != psutil.STATUS_ZOMBIE
            if mark is not None and alive and belongs(mark):
                found.append(process)
    return found


def _tail(path: Path) -> str:
    """The last lines of a file; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-_TAIL_LINES:])
