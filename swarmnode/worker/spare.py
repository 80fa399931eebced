"""A worker child that has its libraries before a job needs one: importing torch takes seconds."""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

from swarmnode.children import Child, python_module, spawn_child
from swarmnode.errors import ChildError

REFILL_S = 5.0
"""A taken spare is replaced after so long: the job that took it goes first."""
KEEP_S = 300.0
"""So long after its last job, or after it was asked about one, a node keeps its spare."""


class Spare:
    """Starts worker children; at most one waits, on a node that works for a job or was asked to.

    Use it in the thread that children live with, on one event loop.
    """

    def __init__(self, num_threads: int, log: Path) -> None:
        """`log` is where the children's words go."""
        self._num_threads = num_threads
        self._log = log
        self._waiting: Child | None = None
        self._num_jobs = 0
        self._called = asyncio.Event()

    @contextlib.contextmanager
    def wanted(self) -> Iterator[None]:
        """While a job is worked for or asked about, and KEEP_S longer, a child is to wait."""
        self._num_jobs += 1
        self._called.set()
        try:
            yield
        finally:
            self._num_jobs -= 1
            self._called.set()

    def take(self, name: str) -> Child:
        """A child for one job; it may still be importing. Raises: ChildError."""
        child, self._waiting = self._waiting, None
        self._called.set()
        if child is None or not child.is_alive:
            if child is not None:
                child.close()
            child = self._spawn()
        child.name = name
        return child

    async def run(self) -> None:
        """Keep a child waiting while it is wanted, until cancelled."""
        try:
            while True:
                await self._called.wait()
                await asyncio.sleep(REFILL_S)
                self._called.clear()
                self._refill()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(KEEP_S):
                        await self._called.wait()
                        continue
                if self._num_jobs == 0:
                    self._drop()
        finally:
            self._drop()

    def _refill(self) -> None:
        if self._waiting is not None and not self._waiting.is_alive:
            self._drop()
        if self._waiting is None:
            with contextlib.suppress(ChildError):  # whoever needs one will be told
                self._waiting = self._spawn()

    def _drop(self) -> None:
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None

    def _spawn(self) -> Child:
        return spawn_child(
            python_module("swarmnode.worker.engine"),
            env={"OMP_NUM_THREADS": str(self._num_threads), "TOKENIZERS_PARALLELISM": "0"},
            name="a worker child",
            log=self._log,
        )
