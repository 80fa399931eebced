"""One life of a simulated daemon: what it restores, whom it talks to, what it serves."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from swarmnode.coordinator import events as on
from swarmnode.coordinator.ledger import Ledger
from swarmnode.domain import Generation, JobId, PeerId, Plan
from swarmnode.manifest import Manifest
from swarmnode.messages import (
    Assign,
    Frame,
    Inquire,
    Message,
)
from swarmnode.simulation.blobs import ref_of
from swarmnode.simulation.child import Child, Tell
from swarmnode.simulation.coordinating import Coordinating
from swarmnode.simulation.directory import View
from swarmnode.simulation.hosting import Hosting
from swarmnode.simulation.journals import SimJournal
from swarmnode.simulation.keeping import SimStore
from swarmnode.simulation.network import End, Machine, Protocol
from swarmnode.simulation.succession import SimSuccession
from swarmnode.simulation.world import Action, Process, Script
from swarmnode.worker.tenancy import Tenancy, is_voter

if TYPE_CHECKING:
    from swarmnode.simulation.swarm import Swarm


@dataclass(eq=False)
class _Lane:
    """The tensor stream to one peer, about one job."""

    queue: list[tuple[Frame, bytes]] = field(default_factory=list)
    end: End | None = None
    is_done: bool = False


class Daemon:
    """What one machine runs until it dies."""

    def __init__(self, swarm: "Swarm", machine: Machine) -> None:
        self.swarm, self.machine, self.world = swarm, machine, swarm.world
        self.name = machine.name
        self.process = Process(machine.name)
        self.hostings: dict[JobId, Hosting] = {}
        self.runners: dict[JobId, Coordinating] = {}
        self.store = SimStore(machine.disk)
        self.view = View(swarm.directory, machine)
        self.succession = SimSuccession(self)
        self._lanes: dict[tuple[JobId, str], _Lane] = {}
        self._joined: dict[JobId, int] = {}

    def boot(self) -> None:
        """Begin to listen, and take up what an earlier life has left."""
        machine, disk = self.machine, self.machine.disk
        machine.process, machine.accept = self.process, self._accept
        self.swarm.blobs.servers[self.name] = self.store.find
        for job, manifest in self.swarm.manifests.items():
            if f"jobs/{job}/tenancy.json" in disk:
                self._hosting(manifest)
                self.succession.orphaned(job)
            if f"coordinating/{job}/job.json" in disk:
                self.coordinate(manifest)

    def coordinates(self) -> bool:
        """Whether a job that is not over is coordinated here."""
        return any(not runner.is_over for runner in self.runners.values())

    @property
    def monotonic_s(self) -> float:
        """The clock by which the daemon waits: it never jumps."""
        return self.world.now_s

    def start(self, script: Script) -> None:
        self.world.start(self.process, script)

    def after(self, delay_s: float, action: Action, *arguments: Any) -> None:
        self.world.after(delay_s, self.process, action, *arguments)

    def note(self, text: str) -> None:
        self.world.tell(self.name, text)

    # ---- coordinating ----------------------------------------------------------------------

    def submit(self, manifest: Manifest) -> None:
        """Take a job, as its owner's node."""
        self.machine.disk.replace(f"coordinating/{manifest.job}/job.json", b"{}")
        self.coordinate(manifest)

    def coordinate(self, manifest: Manifest) -> None:
        """Run a job from what its journal says."""
        journal = SimJournal(self.machine.disk, f"coordinating/{manifest.job}/journal")
        ledger = Ledger(
            manifest, self.swarm.facts(manifest), PeerId(self.name), b"", self.monotonic_s
        )
        ledger.restore([record for record in journal.found if self._is_readable(record)])
        self.swarm.invariants.restored(manifest.job, self.name, ledger.step)
        canonical = manifest.canonical()
        runner = Coordinating(self, ledger, canonical, journal)
        self.runners[manifest.job] = runner
        runner.start()

    def _is_readable(self, record: on.Record) -> bool:
        """Checkpoints of which something is gone or damaged are left out."""
        if not isinstance(record, on.CheckpointRecord):
            return True
        found = [(ref, self.store.find(ref)) for ref in record.indexes]
        return all(data is not None and ref_of(data) == ref for ref, data in found)

    # ---- what a hosting needs --------------------------------------------------------------

    def verify_lease(
        self, tenancy: Tenancy, lease: bytes, sender: PeerId, generation: Generation
    ) -> bool:
        """A voter of the last plan, or who was elected; signatures are taken for genuine."""
        return is_voter(tenancy, lease, sender, generation) or lease == sender.encode()

    def num_lines(self, job: JobId) -> int:
        """Lines of a job's journal that we know, as its coordinator or as a voter."""
        runner, known = self.runners.get(job), self.succession.journals.num_lines(job)
        return known if runner is None or runner.is_over else max(known, runner.num_lines)

    def take_over(self, job: JobId) -> None:
        """Stand for election, with the journal as it was told. Raises: OSError."""
        runner = self.runners.get(job)
        if runner is not None and not runner.is_over:
            return
        disk, folder = self.machine.disk, f"coordinating/{job}"
        self.swarm.invariants.replaced_journal(job, self.name)
        disk.replace(f"{folder}/journal", disk.read(self.succession.journals.path(job)))
        disk.replace(f"{folder}/job.json", b"{}")
        self.coordinate(self.swarm.manifests[job])

    # ---- streams ---------------------------------------------------------------------------

    def _accept(self, end: End, protocol: Protocol) -> None:
        def first(message: Message, _payload: bytes) -> None:
            manifest = self.swarm.manifests.get(getattr(message, "job", JobId("")))
            if not isinstance(message, Inquire | Assign) or manifest is None:
                end.close()
                return
            hosting = self._hosting(manifest)
            end.on_message = lambda message, _: hosting.take(end, message)
            end.on_closed = lambda _: hosting.lost(end)
            hosting.take(end, message)

        def frame(message: Message, payload: bytes) -> None:
            if isinstance(message, Frame):
                self._admit(end, message, payload)

        end.on_message = first if protocol == "control" else frame

    def _hosting(self, manifest: Manifest) -> Hosting:
        hosting = self.hostings.get(manifest.job)
        if hosting is None:
            hosting = self.hostings[manifest.job] = Hosting(self, manifest)
        return hosting

    def _admit(self, end: End, frame: Frame, payload: bytes) -> None:
        """As `Switch`: frames of the plan at hand, by those who may send them."""
        hosting = self.hostings.get(frame.job)
        plan = hosting.plan if hosting is not None else None
        if hosting is None or plan is None or not plan.names(PeerId(end.peer)):
            end.close()
        elif frame.generation == plan.generation and self._is_for_us(plan, end, frame):
            hosting.on_frame(frame, payload)

    def _is_for_us(self, plan: Plan, end: End, frame: Frame) -> bool:
        if frame.target not in plan or frame.source not in plan:
            return False
        return plan.host(frame.target) == self.name and plan.host(frame.source) == end.peer

    def join(self, job: JobId, plan: Plan) -> None:
        """Frames go by this plan now, on streams of its own."""
        if plan.generation > self._joined.get(job, -1):
            self.leave(job)
        self._joined[job] = plan.generation

    def leave(self, job: JobId) -> None:
        for (of, peer), lane in list(self._lanes.items()):
            if of == job:
                self._close_lane(job, peer, lane)

    def _close_lane(self, job: JobId, peer: str, lane: _Lane) -> None:
        lane.is_done = True
        if lane.end is not None:
            lane.end.close()
        self._lanes.pop((job, peer), None)

    def send_frame(self, frame: Frame, payload: bytes) -> None:
        hosting = self.hostings[frame.job]
        plan = hosting.plan
        if plan is None or frame.generation != plan.generation:
            return
        peer = plan.host(frame.target)
        lane = self._lanes.get((frame.job, peer))
        if lane is None or lane.is_done:
            lane = self._lanes[frame.job, peer] = _Lane()
            self.start(self._open_lane(frame.job, peer, lane))
        if lane.end is not None:
            lane.end.send(frame, payload)
        else:
            lane.queue.append((frame, payload))

    def _open_lane(self, job: JobId, peer: str, lane: _Lane) -> Script:
        end = yield from self.swarm.network.open(self.machine, peer, "tensor")
        if lane.is_done:
            if end is not None:
                end.close()
            return

        def closed(_reason: str) -> None:
            if not lane.is_done:
                lane.is_done = True
                self.hostings[job].work.on_broken(peer)

        if end is None:
            closed("cannot be reached")
            return
        end.on_closed = closed
        lane.end = end
        plan = self.hostings[job].plan
        for frame, payload in lane.queue:
            if plan is not None and frame.generation == plan.generation:
                end.send(frame, payload)
        lane.queue.clear()

    def spawn(self, manifest: Manifest, tell: Tell) -> Child:
        """A new worker child."""
        swarm, section = self.swarm, self.swarm.section(manifest.job)
        per_slot = section.microbatches // section.slots
        return Child(
            self.world, self.process, self.name, self.machine.disk, manifest,
            swarm.invariants, tell,
            unit_s=section.step_s / (2 * per_slot) / self.machine.speed,
            write_s=section.state_mb / 200.0,
        )  # fmt: skip
