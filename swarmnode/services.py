"""All services of one node, and the loops that keep them informed."""

import asyncio
import contextlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from swarmnode import __version__, telemetry
from swarmnode.config import DEPARTURE_FILE, NodeConfig
from swarmnode.coordinator.ledger import Ledger
from swarmnode.coordinator.runner import RunnerTools
from swarmnode.coordinator.service import CoordinatorService
from swarmnode.coordinator.solving import Solver
from swarmnode.coordinator.succession import Succession
from swarmnode.domain import Advert, DeviceSpec, JobId, Limits, PeerId
from swarmnode.errors import ChildError, SwarmError
from swarmnode.home import load_token, write_private
from swarmnode.http import server
from swarmnode.http.api import Departure
from swarmnode.messages import Inquire, LinkReport
from swarmnode.node import Node, job_view
from swarmnode.p2p import adverts
from swarmnode.p2p.blob_server import serve_blobs
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.blobs import BlobClient
from swarmnode.p2p.directory.keeper import KeptDirectory
from swarmnode.p2p.identity import Identity
from swarmnode.p2p.lease import vote_text
from swarmnode.p2p.links import LinkEstimate, LinkTable
from swarmnode.p2p.membership import Changed, Membership, Records
from swarmnode.p2p.ports import Transport
from swarmnode.p2p.prober import Prober
from swarmnode.p2p.probing import Responder
from swarmnode.p2p.switch import Switch
from swarmnode.sweeping import sweep_daily
from swarmnode.traces import TRACE_DIRECTORY, TraceFile, ignore_span
from swarmnode.worker.models.tool import FactsDesk, export_model
from swarmnode.worker.nursery import Nursery
from swarmnode.worker.probe import probe
from swarmnode.worker.service import WorkerService, slots_of
from swarmnode.worker.tenancy import may_coordinate
from swarmnode.worker.tools import HostTools

POLL_S = 2.0
"""Seconds between two looks into the directory."""
OBSERVE_S = 5.0


class Services:
    """The services of one node and the loops that keep them informed."""

    def __init__(
        self,
        config: NodeConfig,
        identity: Identity,
        device: DeviceSpec,
        directory: KeptDirectory,
        transport: Transport,
        group: asyncio.TaskGroup,
    ) -> None:
        self._config = config
        self._identity = identity
        self._device = device
        self._directory = directory
        self._transport = transport
        self._log = telemetry.get_logger("daemon").info
        self._incarnation = time.time_ns() // 1_000_000
        self._membership = Membership(lease_s=config.lease_s)
        self._dropped_records: dict[str, int] = {}
        self._facts = FactsDesk(config.home / "model-tool.log")
        self.metrics = telemetry.Metrics(version=__version__, peer=identity.peer)
        self.metrics.set_device_memory(
            total_bytes=device.memory_total_bytes, free_bytes=device.memory_free_bytes
        )
        self._dropped: Counter[str] = Counter()
        home = config.home
        store = BlobStore(home / "blobs", durable=True)
        self._table = LinkTable()
        traces = home / TRACE_DIRECTORY
        switch = Switch(
            transport, group, self._count_dropped, self.metrics.add_sent, self._observe_transfer,
            on_span=TraceFile(traces / "daemon.jsonl").span if config.trace else ignore_span,
        )  # fmt: skip
        blobs = BlobClient(transport, store, self._count_blobs, self._observe_transfer)
        chance = random.SystemRandom()
        self._partners = switch.partners
        self._prober = Prober(transport, self._table, self.peers, switch.partners, chance)
        Responder(transport, self._table, lambda: self._prober.coordinate, self._count_dropped)
        self.worker = WorkerService(
            transport,
            HostTools(
                me=identity.peer,
                incarnation=self._incarnation,
                directory=home / "hosted",
                store=store,
                blobs=blobs,
                switch=switch,
                device=device.kind if config.device == "auto" else config.device,
                num_threads=self._limits.num_threads,
                nursery=Nursery(self._limits.num_threads, home / "worker.log"),
                child_hang_s=config.child_hang_s,
                on_sent=self.metrics.add_sent,
                on_compute=self.metrics.add_compute,
                on_coded=self.metrics.add_codings,
                trace_directory=str(traces) if config.trace else "",
                log=self._log,
                links=self.link_reports,
                verify_lease=may_coordinate,
                vote=self._vote,
                on_entry=lambda job, number, lines: self.succession.entry(job, number, lines),
                num_lines=self._num_lines,
                on_orphaned=lambda job: self.succession.orphaned(job),
                on_named=lambda job: self.succession.named(job),
                on_followed=lambda job: self.succession.followed(job),
                on_adopted=lambda job, plan: self.succession.adopted(job, plan),
            ),
            group,
            self._count_dropped,
            self._log,
        )
        self.coordinator = CoordinatorService(
            identity,
            home / "jobs",
            RunnerTools(
                transport=transport,
                store=store,
                blobs=blobs,
                switch=switch,
                peers=self.peers,
                on_sent=self.metrics.add_sent,
                on_changed=self._observe_job,
                log=self._log,
                solver=Solver(home / "solver.log"),
                links=self.link_reports,
                on_handed_over=lambda job: self.succession.handed_over(job),
            ),
            group,
            self._facts.ask,
        )
        self.succession = Succession(
            identity.peer,
            self.coordinator.standby,
            store,
            blobs,
            self.worker.papers,
            self.coordinator.take_over,
            self.coordinator.retention.forget,
            self.worker.stand_by,
            group,
            self._log,
        )
        serve_blobs(
            transport,
            store,
            lambda peer, job: (
                switch.names(peer, job)
                or self.worker.names(peer, job)
                or self.coordinator.names(peer, job)
            ),
            self._count_blobs,
            upload_bytes_per_s=config.upload_bytes_per_s,
        )
        self.node = Node(
            identity=identity,
            home=home,
            join_address=directory.addresses[0],
            transport_addresses=tuple(transport.addresses),
            device=device.name,
            coordinator=self.coordinator,
            worker=self.worker,
            adverts=self.peers,
            pids=self.pids,
            export_model=self._export_model,
            dropped=self._dropped,
        )

    async def restore(self) -> None:
        """Take up what earlier lives of this node worked for or coordinated."""
        await self.coordinator.restore()
        await self.worker.restore()

    async def leave(self) -> None:
        """Give our slots to others; returns when they have them, or after `drain_s`.

        What came of it is left in the home, also when this is cancelled.
        """
        self._log("leaving", drain_s=self._config.drain_s)
        hosts, me = self.worker.hosts(), self._identity.peer
        before, in_time = slots_of(hosts, me), False
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.drain_s):
                    await self.worker.leave()
                    in_time = True
        finally:
            kept = slots_of(hosts, me)
            handed_over = tuple(slot for slot in before if slot not in kept)
            led = self.coordinator.led(unfollowed={host.job for host in hosts if host.has_heir})
            self._leave_word(Departure(os.getpid(), handed_over, kept, led, in_time))

    def _leave_word(self, departure: Departure) -> None:
        said = asdict(departure)
        self._log("left", **said)
        try:
            write_private(self._config.home / DEPARTURE_FILE, json.dumps(said) + "\n")
        except OSError as error:
            self._log("no word left", reason=str(error))

    def _vote(self, inquire: Inquire, candidate: PeerId) -> bytes:
        return self._identity.sign(vote_text(inquire.job, inquire.generation, candidate))

    # ---- who is here -----------------------------------------------------------------------

    @property
    def _limits(self) -> Limits:
        config, device = self._config, self._device
        allowed = config.memory_bytes
        share = int(0.8 * device.memory_total_bytes) if allowed is None else int(allowed)
        return Limits(
            memory_bytes=min(share, device.memory_total_bytes),
            num_threads=config.num_threads or device.num_cores,
        )

    def peers(self) -> tuple[Advert, ...]:
        """Everybody with a valid lease, ourselves included."""
        return self._membership.peers(time.time())

    async def advertise(self) -> None:
        """Renew our own advert three times in each lease."""
        lease_s = self._config.lease_s
        while True:
            advert = Advert(
                peer=self._identity.peer,
                addresses=tuple(self._transport.addresses)[: adverts.MAX_ADDRESSES],
                device=self._device,
                limits=self._limits,
                version=__version__,
                incarnation=self._incarnation,
                expires_at_s=time.time() + lease_s,
                reach=self._prober.reach(),
            )
            try:
                record = adverts.encode(advert, self._identity.sign)
                self._membership.handle(Records({advert.peer: record}, {advert.peer}), time.time())
                await self._directory.advertise(record, lease_s)
            except SwarmError as error:
                self._log("advert not stored", reason=str(error))
            await asyncio.sleep(lease_s / 3)
            with contextlib.suppress(ChildError, OSError):  # what was measured before still holds
                self._device = await probe(self._config.home)

    async def look(self) -> None:
        """Read the directory again and again."""
        while True:
            partners = self._partners()
            known = (*sorted(partners), *(advert.peer for advert in self.peers()))
            try:
                records = await self._directory.records(known)
            except SwarmError as error:  # stuck, or being started again
                self._log("directory does not answer", reason=str(error))
            else:
                for some in Records(records, partners).pieces():
                    await asyncio.sleep(0)  # others have work to do between
                    for effect in self._membership.handle(some, time.time()):
                        if not isinstance(effect, Changed):  # free memory changes all the time
                            self._log("peer", what=type(effect).__name__, effect=str(effect)[:300])
                self.metrics.set_peers(len(self.peers()))
                self._count_bad_records()
            await asyncio.sleep(POLL_S)

    def _count_bad_records(self) -> None:
        for source in (self._membership.dropped, self._directory.refused):
            for reason, count in source.items():
                fresh = count - self._dropped_records.get(reason, 0)
                if fresh > 0:
                    self._dropped_records[reason] = count
                    self._count_dropped(f"record_{reason}", fresh)

    # ---- how far away they are -------------------------------------------------------------

    def links(self) -> Mapping[PeerId, LinkEstimate]:
        """What this node has measured of its links."""
        return self._table.estimates(time.monotonic())

    def link_reports(self) -> tuple[LinkReport, ...]:
        """The same as a message to a coordinator tells it."""
        return self._table.reports(time.monotonic())

    async def measure(self) -> None:
        """Probe a few peers now and then."""
        await self._prober.run()

    async def _num_lines(self, job: JobId) -> int:
        """Lines of a job's journal that this node knows, as its coordinator or as a voter."""
        return max(await self.succession.num_lines(job), await self.coordinator.num_lines(job))

    def _observe_transfer(self, peer: PeerId, num_bytes: int, seconds: float) -> None:
        self._table.observe_transfer(peer, num_bytes, seconds, time.monotonic())

    async def sweep(self) -> None:
        """Delete what nobody asks for any more, now and once a day."""
        await sweep_daily((self.worker.sweep, self.succession.sweep), self._log)

    # ---- what is seen ----------------------------------------------------------------------

    async def observe(self) -> None:
        """Measure the node's own processes now and then."""
        while True:
            self.metrics.observe_children(self.pids())
            self.metrics.set_device_memory(
                total_bytes=self._device.memory_total_bytes,
                free_bytes=self._device.memory_free_bytes,
            )
            present = {advert.peer for advert in self.peers()}
            self.metrics.set_links(
                {
                    peer: (link.latency_s, link.bytes_per_s)
                    for peer, link in self.links().items()
                    if peer in present
                }
            )
            await asyncio.sleep(OBSERVE_S)

    def pids(self) -> Mapping[str, int]:
        """Our processes by role."""
        children = {
            f"worker:{host.job}": host.child_pid
            for host in self.worker.hosts()
            if host.child_pid is not None
        }
        return {"daemon": os.getpid(), "directory": self._directory.pid, **children}

    def _observe_job(self, ledger: Ledger) -> None:
        view = job_view(ledger, with_losses=False)
        self.metrics.observe_job(
            job_id=view.job,
            job_name=view.name,
            step=view.step,
            num_steps=view.num_steps,
            loss=view.loss,
            val_loss=view.val_loss,
            step_s=view.step_s,
            tokens_per_s=view.tokens_per_s,
            tokens_total=view.tokens_total,
            generation=view.generation,
            recoveries=view.recoveries,
            recovery_s=view.recovery_s,
            predicted_step_s=view.predicted_step_s,
            bytes_by_kind=view.bytes_by_kind,
        )
        if view.phase != "training":
            self.metrics.idle_job(view.job)

    def _count_dropped(self, reason: str, number: int = 1) -> None:
        self._dropped[reason] += number
        self.metrics.count_dropped(reason, number)

    def _count_blobs(self, event: str, _peer: PeerId, amount: int) -> None:
        if event == "sent_bytes":
            self.metrics.add_sent("blob", amount)
        elif event != "received_bytes":
            self._count_dropped(f"blob_{event}", amount)

    # ---- what is offered -------------------------------------------------------------------

    async def serve(self, on_ready: Callable[[Node], None]) -> None:
        """Serve HTTP on this machine, and tell the command line where."""
        config, home = self._config, self._config.home
        token = load_token(home / "token")
        (home / DEPARTURE_FILE).unlink(missing_ok=True)  # of an earlier life

        def bound(port: int) -> None:
            self.node.http_address = f"http://127.0.0.1:{port}"
            body = {"address": self.node.http_address, "pid": os.getpid()}
            write_private(home / "http.json", json.dumps(body) + "\n")
            if config.targets_directory is not None:
                telemetry.write_target(
                    config.targets_directory, peer=self._identity.peer, address=f"127.0.0.1:{port}"
                )
            on_ready(self.node)

        try:
            await server.serve(self.node, self.metrics, token, "127.0.0.1", config.http_port, bound)
        finally:
            (home / "http.json").unlink(missing_ok=True)
            if config.targets_directory is not None:
                telemetry.remove_target(config.targets_directory, peer=self._identity.peer)

    async def _export_model(
        self, config: Mapping[str, Any], weights: Path, tokenizer: Path, directory: Path
    ) -> None:
        log = self._config.home / "model-tool.log"
        await export_model(config, weights, tokenizer, directory, log)
