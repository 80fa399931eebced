"""The worker side of a node: takes work from coordinators that a signed manifest vouches for."""

import asyncio
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from swarmnode.domain import JobId, PeerId
from swarmnode.errors import ManifestError, PeerError, ProtocolError, SwarmError
from swarmnode.manifest import Manifest, check
from swarmnode.messages import Assign
from swarmnode.p2p.identity import verify
from swarmnode.p2p.ports import Stream, Transport
from swarmnode.p2p.session import DEAD_AFTER_S, first_error
from swarmnode.wire import CONTROL_PROTOCOL, MAX_CONTROL_BYTES, unpack
from swarmnode.worker.hosting import HostTools, JobHost

MAX_JOBS = 4
"""Jobs that a node works for at once: each has a child of its own."""


@dataclass
class _Running:
    host: JobHost
    task: asyncio.Task[None]


class WorkerService:
    """Hosts slots of any number of jobs; one control stream, and one child, for each."""

    def __init__(
        self,
        transport: Transport,
        tools: HostTools,
        on_dropped: Callable[[str], None],
        log: Callable[..., None],
    ) -> None:
        self._tools = tools
        self._on_dropped = on_dropped
        self._log = log
        self._running: dict[JobId, _Running] = {}
        shutil.rmtree(tools.directory, ignore_errors=True)  # of a life that was killed
        transport.serve(CONTROL_PROTOCOL, self._accept, max_message_bytes=MAX_CONTROL_BYTES)

    def hosts(self) -> tuple[JobHost, ...]:
        """The jobs that this node works for now."""
        return tuple(running.host for _, running in sorted(self._running.items()))

    async def _accept(self, stream: Stream) -> None:
        """Serve one coordinator's control stream; a newer one for the same job replaces it."""
        try:
            async with asyncio.timeout(DEAD_AFTER_S):
                assign, payload = unpack(await stream.receive())
            if not isinstance(assign, Assign):
                raise ProtocolError("a control stream begins with an assignment")
            manifest = self._check(stream.peer, assign, bytes(payload))
        except (PeerError, TimeoutError) as error:
            self._on_dropped("bad_assignment")
            self._log("assignment refused", peer=stream.peer, reason=str(error))
            return
        while (earlier := self._running.get(manifest.job)) is not None:
            earlier.task.cancel()
            await asyncio.wait([earlier.task])
        task = asyncio.current_task()
        assert task is not None
        host = JobHost(manifest, bytes(payload), self._tools)
        running = self._running[manifest.job] = _Running(host, task)
        self._log("job taken", job=manifest.job, name=manifest.name)
        try:
            await host.run(stream, assign)
        except* SwarmError as failures:
            self._log("coordinator lost", job=manifest.job, reason=str(first_error(failures)))
        finally:
            if self._running.get(manifest.job) is running:
                del self._running[manifest.job]
            self._log("job left", job=manifest.job)

    def _check(self, sender: PeerId, assign: Assign, canonical: bytes) -> Manifest:
        """The manifest, if its submitter signed it and is the one who assigns."""
        if len(canonical) > MAX_CONTROL_BYTES or not canonical:
            raise ProtocolError("an assignment without a manifest")
        try:
            manifest = check(Manifest, json.loads(canonical), "manifest")
        except (ValueError, RecursionError, ManifestError) as error:
            raise ProtocolError(str(error)) from None
        if manifest.job != assign.job or manifest.canonical() != canonical:
            raise ProtocolError("the manifest is not the one that its job id names")
        if not sender == manifest.submitter == assign.plan.coordinator:
            raise ProtocolError(f"{sender} does not coordinate job {assign.job}")
        if not verify(manifest.submitter, canonical, assign.signature):
            raise ProtocolError("the manifest's signature is wrong")
        if not assign.plan.is_whole or not assign.plan.hosted_by(self._tools.me):
            raise ProtocolError("an assignment that gives us nothing")
        if manifest.job not in self._running and len(self._running) >= MAX_JOBS:
            raise ProtocolError(f"this node works for {MAX_JOBS} jobs already")
        return manifest
