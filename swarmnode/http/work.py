"""Long work in a thread, told to a client while it goes on."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

from swarmnode.errors import SwarmError
from swarmnode.http.api import CheckpointView, CoarserLink, Work
from swarmnode.p2p.checkpoints import Checkpoint

TELL_S = 0.25
"""Seconds between two words on how far it is."""


class Counted:
    """Bytes done so far, counted in a thread and read from the loop."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._done = 0
        self._is_over = threading.Event()

    def add(self, num_bytes: int) -> None:
        """In the thread: so many more bytes are done. Raises: SwarmError once nobody listens."""
        if self._is_over.is_set():
            raise SwarmError("broken off: nobody waits for it")
        self._done += num_bytes

    async def until(self, task: "asyncio.Future[Any]") -> AsyncIterator[Work]:
        """How far it is, again and again, until `task` is done; left early, the work ends."""
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=TELL_S)
                yield Work(min(self._done, self.total), self.total)
        finally:
            self._is_over.set()
            if not task.done():
                await asyncio.wait({task}, timeout=TELL_S)
                task.cancel()
                task.add_done_callback(lambda each: each.cancelled() or each.exception())


def checkpoint_view(checkpoint: Checkpoint) -> CheckpointView:
    """A checkpoint as people see it."""
    manifest = checkpoint.manifest
    return CheckpointView(
        step=manifest.step,
        generation=manifest.generation,
        created_at_s=manifest.created_at_s,
        loss=manifest.loss,
        num_atoms=len(manifest.atoms),
        num_bytes=manifest.num_bytes,
        weights_sha256=manifest.weights_sha256,
        sha256=checkpoint.sha256,
        parent=manifest.parent,
        coordinator=manifest.coordinator,
        codecs=manifest.codecs,
        coarser_links=tuple(CoarserLink(*link) for link in manifest.coarser_links),
    )
