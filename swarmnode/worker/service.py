"""The worker side of a node: takes work from coordinators that a signed manifest vouches for."""

import asyncio
import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from swarmnode.domain import JobId, PeerId
from swarmnode.errors import ManifestError, PeerError, ProtocolError, SwarmError
from swarmnode.handovers import StandingBy
from swarmnode.heartbeats import Checking
from swarmnode.home import KEPT_S
from swarmnode.manifest import Manifest, check
from swarmnode.messages import (
    Answer,
    Assign,
    Inquire,
)
from swarmnode.p2p.identity import verify
from swarmnode.p2p.ports import Stream, Transport
from swarmnode.p2p.session import DEAD_AFTER_S, HEARTBEAT_S, first_error
from swarmnode.papers import Papers
from swarmnode.wire import CONTROL_PROTOCOL, MAX_CONTROL_BYTES, pack, unpack
from swarmnode.worker.hosting import JobHost
from swarmnode.worker.state_keeper import load_tenancy
from swarmnode.worker.tools import HostTools

MAX_JOBS = 4
"""Jobs that a node works for at once: each has a child of its own."""
SAY_AGAIN_S = 1.0
"""Who leaves says so again after so long, until it is let go."""
SAVE_AGAIN_S = 10.0
"""Between two looks whether a full disk has room for what was promised at a job's end."""


class WorkerService:
    """Hosts stages of any number of jobs; one control stream, and one child, for each."""

    def __init__(
        self,
        transport: Transport,
        tools: HostTools,
        group: asyncio.TaskGroup,
        on_dropped: Callable[[str], None],
        log: Callable[..., None],
    ) -> None:
        """Jobs run in `group`: they outlive the streams of their coordinators."""
        self._tools = tools
        self._group = group
        self._on_dropped = on_dropped
        self._log = log
        self._hosts: dict[JobId, JobHost] = {}
        self._unreadable: set[JobId] = set()
        """Jobs of which the log says that their papers cannot be read."""
        transport.serve(CONTROL_PROTOCOL, self._accept, max_message_bytes=MAX_CONTROL_BYTES)

    async def nurse(self) -> None:
        """Have a child at hand that can compute at once, while there are jobs."""
        await self._tools.nursery.run()

    def hosts(self) -> tuple[JobHost, ...]:
        """The jobs that this node works for now."""
        return tuple(host for _, host in sorted(self._hosts.items()) if host.is_running)

    def names(self, peer: PeerId, job: JobId) -> bool:
        """Whether `peer` may have blobs of a job that this node holds state of."""
        host = self._hosts.get(job)
        return host is not None and host.names(peer)

    def papers(self, job: JobId) -> Papers | None:
        """What we have in hand of a job, also of one that an earlier life worked for.

        None too where that is damaged, or of another version; the log says so once.
        """
        host = self._hosts.get(job)
        if host is not None and (host.papers is not None or host.has_unsaved_release):
            return host.papers
        try:
            found = load_tenancy(self._tools.directory / job)
            if found is None:
                return None
            tenancy, canonical, signature = found
            if tenancy.plan is None or tenancy.is_released:
                return None
            manifest = check(Manifest, json.loads(canonical), "manifest")
        except (SwarmError, ValueError, RecursionError) as error:
            if job not in self._unreadable:
                self._unreadable.add(job)
                self._log("papers not readable", job=job, reason=str(error))
            return None
        return Papers(manifest, canonical, signature, tenancy.plan, tenancy.lease)

    async def restore(self) -> None:
        """Wait for the coordinators of an earlier life's jobs, or for what follows without one."""
        for folder in sorted(self._tools.directory.glob("*/")):
            try:
                self._tools.on_orphaned(JobId(folder.name))
            except Exception as error:  # what one job left cannot be read: the others go on
                self._log("job not taken up", job=folder.name, reason=str(error))

    async def sweep(self, now_s: float) -> None:
        """Delete the folders of jobs that nobody asked for in KEPT_S."""
        for host in self.hosts():  # it may serve for weeks without a word to its disk
            with contextlib.suppress(OSError):
                os.utime(self._tools.directory / host.job, (now_s, now_s))
        for folder in await asyncio.to_thread(old_folders, self._tools.directory, now_s):
            if JobId(folder.name) not in self._hosts:
                # It is gone at once: whoever asks from now on finds no half of it.
                gone = folder.rename(folder.with_name(f".{folder.name}.gone"))
                await asyncio.to_thread(shutil.rmtree, gone, ignore_errors=True)

    def stand_by(self, job: JobId) -> None:
        """Tell the job's coordinator that this node has all that it needs in its place."""
        host = self._hosts.get(job)
        if host is not None:
            host.post(StandingBy(job, host.tenancy.promised))

    async def leave(self) -> None:
        """Give every slot to others; returns when coordinators have let us go, or are gone.

        Says so again and again: a coordinator may be another one meanwhile.
        """
        while leaving := [host for host in self.hosts() if not host.alone.is_set()]:
            for host in leaving:
                host.leave()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SAY_AGAIN_S):
                    for host in leaving:
                        await host.alone.wait()
        for host in self.hosts():
            await host.settled()

    async def _accept(self, stream: Stream) -> None:
        """Serve a coordinator's control stream, which begins with a question or an assignment."""
        try:
            async with asyncio.timeout(DEAD_AFTER_S):
                first, payload = unpack(await stream.receive())
            if not isinstance(first, Inquire | Assign):
                raise ProtocolError("a control stream begins with a question or an assignment")
            manifest = self._check(stream.peer, first, bytes(payload))
        except (PeerError, TimeoutError) as error:
            self._refuse(stream.peer, error)
            return
        host = self._hosts.get(manifest.job)
        if host is None:
            host = JobHost(manifest, bytes(payload), first.signature, self._tools)
            self._hosts[manifest.job] = host
        try:
            await self._serve(stream, host, first)
        finally:
            self._forget(host)

    async def _serve(self, stream: Stream, host: JobHost, first: Inquire | Assign) -> None:
        try:
            answer = await self._considered(stream, host, first)
        except SwarmError as error:
            self._refuse(stream.peer, error)
            return
        if answer is not None and not answer.granted:
            self._on_dropped("fenced")
            self._log("not promised", job=host.job, peer=stream.peer, promised=answer.promised)
            await stream.send(pack(answer))
            return
        await host.settled()
        if not host.is_running:
            host.begin()
            self._group.create_task(self._run(host), name=f"job {host.job}")
        try:
            await host.serve(stream, first, answer)
        except* SwarmError as failures:
            self._log("coordinator lost", job=host.job, reason=str(first_error(failures)))

    async def _considered(
        self, stream: Stream, host: JobHost, first: Inquire | Assign
    ) -> Answer | None:
        """What the host answers. To read what it holds may take minutes; whoever asked hears
        meanwhile that it is not dead. Raises: SwarmError as `JobHost.consider`."""
        considering = asyncio.ensure_future(host.consider(first, stream.peer))
        try:
            while not (await asyncio.wait([considering], timeout=HEARTBEAT_S))[0]:
                with contextlib.suppress(PeerError):  # what was read is read for the next one
                    await stream.send(pack(Checking(host.job)))
        finally:
            considering.cancel()
        return considering.result()

    async def _run(self, host: JobHost) -> None:
        """Hold one job until its end; what goes wrong in it ends it, and nothing else."""
        self._log("job taken", job=host.job, name=host.manifest.name)
        try:
            with self._tools.nursery.wanted():
                await host.run()
        except* Exception as failures:
            self._log("job failed", job=host.job, reason=str(first_error(failures)))
        finally:
            self._forget(host)
            self._log("job left", job=host.job)
        if host.has_unsaved_release:
            await self._save_release(host)

    async def _save_release(self, host: JobHost) -> None:
        """Write that a job was left as soon as there is room, unless it is taken up before."""
        while host.has_unsaved_release:
            await asyncio.sleep(SAVE_AGAIN_S)
            with contextlib.suppress(SwarmError):
                await host.save_release()
        self._log("release written", job=host.job)
        self._forget(host)

    def _forget(self, host: JobHost) -> None:
        """What is not held in memory is read from the disk when somebody asks again."""
        idle = not host.is_running and not host.num_asking and not host.has_unsaved_release
        if idle and self._hosts.get(host.job) is host:
            del self._hosts[host.job]

    def _refuse(self, peer: PeerId, error: Exception) -> None:
        self._on_dropped("bad_assignment")
        self._log("assignment refused", peer=peer, reason=str(error))

    def _check(self, sender: PeerId, first: Inquire | Assign, canonical: bytes) -> Manifest:
        """The manifest, if its submitter signed it and it gives us something to do."""
        if len(canonical) > MAX_CONTROL_BYTES or not canonical:
            raise ProtocolError("an assignment without a manifest")
        try:
            manifest = check(Manifest, json.loads(canonical), "manifest")
        except (ValueError, RecursionError, ManifestError) as error:
            raise ProtocolError(str(error)) from None
        if manifest.job != first.job or manifest.canonical() != canonical:
            raise ProtocolError("the manifest is not the one that its job id names")
        if isinstance(first, Assign) and first.plan.coordinator != sender:
            raise ProtocolError(f"{sender} does not coordinate job {first.job}")
        if not verify(manifest.submitter, canonical, first.signature):
            raise ProtocolError("the manifest's signature is wrong")
        if isinstance(first, Assign):
            plan = first.plan
            if not plan.is_whole or not plan.held_by(self._tools.me):
                raise ProtocolError("an assignment that gives us nothing")
        running = [host for host in self._hosts.values() if host.is_running]
        if len(running) >= MAX_JOBS and manifest.job not in {host.job for host in running}:
            raise ProtocolError(f"this node works for {MAX_JOBS} jobs already")
        return manifest


def slots_of(hosts: Iterable[JobHost], me: PeerId) -> tuple[str, ...]:
    """The slots that these jobs give to `me`, as `JOB stage/slot`."""
    return tuple(
        f"{host.job} {at.stage}/{at.slot}"
        for host in hosts
        if host.plan is not None and not host.tenancy.is_released and host.tenancy.plan is not None
        for at in host.tenancy.plan.hosted_by(me)
    )


def old_folders(directory: Path, now_s: float) -> list[Path]:
    """The folders of jobs in which nothing was written for KEPT_S, as far as they can be read."""
    found = []
    for folder in directory.iterdir() if directory.is_dir() else ():
        with contextlib.suppress(OSError):
            times = [path.stat().st_mtime for path in (folder, *folder.rglob("*")) if path.exists()]
            if folder.is_dir() and max(times) < now_s - KEPT_S:
                found.append(folder)
    return found
