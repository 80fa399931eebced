"""A whole simulated swarm: machines, jobs, what goes wrong, and whether all is well."""

from collections.abc import Callable

from swarmnode.coordinator import events as on
from swarmnode.coordinator.cost.needs import machine_bytes, split_layers, stage_needs
from swarmnode.domain import BlobRef, JobId, ModelFacts, PeerId
from swarmnode.manifest import (
    BatchConfig,
    CodecConfig,
    DataContent,
    Manifest,
    ModelContent,
    PlacementConfig,
    RunConfig,
)
from swarmnode.messages import (
    Answer,
    Assign,
    Commit,
)
from swarmnode.simulation.blobs import Blobs
from swarmnode.simulation.daemon import Daemon
from swarmnode.simulation.directory import Directory
from swarmnode.simulation.faults import Faults
from swarmnode.simulation.history import HASH_BYTES, History
from swarmnode.simulation.invariants import Invariants, Violation
from swarmnode.simulation.network import Machine, Network
from swarmnode.simulation.scenario import JobSection, Scenario
from swarmnode.simulation.statistics import Statistics
from swarmnode.simulation.world import World

BATCH = 50
"""Events between two looks at whether all is done."""
_BLOB = BlobRef("0" * 64, 1)
MAX_EVENTS_PER_S = 400
"""More, for long, and something runs in a circle."""


class Swarm:
    """Everything of one run. `run` raises Violation if something happened that never may."""

    def __init__(self, scenario: Scenario, seed: int, *, keep_trace: bool = False) -> None:
        self.scenario, self.seed = scenario, seed
        self.world = World(seed, keep_trace=keep_trace)
        self.network = Network(self.world)
        self.directory = Directory(self.world, scenario.swarm.lease_s)
        self.blobs = Blobs(self.network)
        self.invariants = Invariants()
        self.daemons: dict[str, Daemon] = {}
        """The one that runs on each machine, or that ran last."""
        self.manifests: dict[JobId, Manifest] = {}
        self._sections: dict[JobId, JobSection] = {}
        self._facts: dict[JobId, ModelFacts] = {}
        self._disturbed_s: dict[str, float] = {}
        self._commit_s: dict[JobId, float] = {}
        self.statistics = Statistics()
        self.improve_share = 0.3 if scenario.faults is not None else 0.0
        for _ in range(self.world.random.randint(*scenario.swarm.nodes)):
            self.add_machine()
        self._submit_all()
        self.faults = Faults(self)

    # ---- machines --------------------------------------------------------------------------

    def add_machine(self) -> Machine:
        chance, swarm = self.world.random, self.scenario.swarm
        machine = Machine(
            f"n{len(self.network.machines):03}",
            latency_s=chance.uniform(*swarm.latency_ms) / 1e3,
            bytes_per_s=chance.uniform(*swarm.mbit) * 1e6 / 8,
            speed=chance.uniform(*swarm.speed),
        )
        self.network.add(machine)
        self.boot(machine)
        return machine

    def boot(self, machine: Machine) -> None:
        """Start the daemon of a machine."""
        name = machine.name
        daemon = self.daemons[name] = Daemon(self, machine)
        self.directory.publish(
            machine, flops=1e9 * machine.speed, memory_bytes=self._memory_bytes()
        )
        self.disturbed(name)
        self.network.rebooted(machine)
        daemon.boot()
        daemon.note("started")

    def kill(self, machine: Machine, *, with_power: bool) -> None:
        """The daemon is gone, and with the power what its disk had not written."""
        if not machine.runs:
            return
        assert machine.process is not None
        self.daemons[machine.name].note("loses its power" if with_power else "is killed")
        self.world.kill(machine.process)
        machine.accept = None
        self.network.died(machine, with_power=with_power)
        if with_power:
            machine.disk.lose_power(self.world.random)
        self.directory.pause(machine.name)
        self.disturbed(machine.name)

    def disturbed(self, name: str) -> None:
        """Something happened to this machine: it cannot be blamed for a while."""
        self._disturbed_s[name] = self.world.now_s

    def hit(self, name: str, kind: str) -> None:
        """A fault happens to this machine."""
        self.statistics.hit(name, kind, self.world.now_s)

    def _memory_bytes(self) -> int:
        """Room for as many slots as the scenario says, of the job with the largest stages."""
        most = 1
        for job in self.scenario.jobs:
            facts = _facts(job)
            manifest = _manifest(job, "n000", 0, 0)
            needs = stage_needs(facts, manifest, split_layers(facts.num_layers, job.stages))
            largest = max(machine_bytes(needs, [stage]) for stage in range(job.stages))
            most = max(most, int(largest * self.scenario.swarm.slots_per_node) + 1)
        return most

    # ---- jobs ------------------------------------------------------------------------------

    def _submit_all(self) -> None:
        for number, section in enumerate(self.scenario.jobs):
            owner = f"n{number % len(self.network.machines):03}"
            manifest = _manifest(section, owner, self.seed, number)
            job = manifest.job
            self.manifests[job], self._sections[job] = manifest, section
            self._facts[job] = _facts(section)
            shard_bytes = HASH_BYTES + section.microbatches
            factor = section.update_mb * 1e6 / (section.slots * shard_bytes)
            self.network.byte_factors[job] = max(1.0, factor)
            self.invariants.add(job, History.of(manifest))
            self.world.after(0.5, None, self._submit, owner, manifest)

    def _submit(self, owner: str, manifest: Manifest) -> None:
        """Its owner submits a job as soon as its machine is up, and writes to its disk."""
        daemon = self.daemons[owner]
        if daemon.process.alive and not daemon.process.frozen and not daemon.machine.disk.is_full:
            daemon.submit(manifest)
        else:
            self.world.after(1.0, None, self._submit, owner, manifest)

    def section(self, job: JobId) -> JobSection:
        return self._sections[job]

    def facts(self, manifest: Manifest) -> ModelFacts:
        return self._facts[manifest.job]

    def is_done(self, job: JobId) -> bool:
        """Whether some coordinator serves the finished model."""
        return any(
            daemon.process.alive
            and (runner := daemon.runners.get(job)) is not None
            and runner.ledger.phase == "serving"
            for daemon in self.daemons.values()
        )

    # ---- what is watched -------------------------------------------------------------------

    def journaled(self, job: JobId, who: str, record: on.Record) -> None:
        before = self.invariants.num_committed(job)
        self.invariants.journaled(job, who, record)
        if not isinstance(record, on.CommitRecord):
            return
        self._commit_s[job] = self.world.now_s
        if self.invariants.num_committed(job) > before:
            self.statistics.committed(job, record, self.world.now_s)

    def begun(self, job: JobId, who: str, assign: Assign) -> None:
        def known_at(peer: str) -> set[int]:
            return self.network.presence.moments(who, peer, self.world.now_s)

        self.invariants.begun(job, who, assign.plan, assign.step, known_at)
        self.statistics.begun(job, assign.plan, self.world.now_s)

    def commit_sent(self, job: JobId, who: str, commit: Commit) -> None:
        self.invariants.commit_sent(job, who, commit)

    def answered(self, who: str, answer: Answer) -> None:
        self.invariants.answered(answer.job, who, answer)

    # ---- running ---------------------------------------------------------------------------

    def run(self, on_time: Callable[[float], None] = lambda _: None) -> Statistics:
        """Until the jobs are done, or the scenario's time is over; `on_time` hears of progress."""
        scenario, world = self.scenario, self.world
        self.faults.schedule()
        limit_s = scenario.duration_s or self.faults.last_s + scenario.budget_s
        while world.now_s < limit_s:
            on_time(world.now_s)
            num_done = sum(world.step() for _ in range(BATCH))
            if scenario.duration_s is None and all(map(self.is_done, self.manifests)):
                break
            if num_done < BATCH:
                raise Violation(self._why_not_done())
            if world.num_events > MAX_EVENTS_PER_S * (world.now_s + 60.0):
                raise Violation(f"{world.num_events} events in {world.now_s:.0f} s: a circle")
        else:
            if scenario.duration_s is None:
                raise Violation(self._why_not_done())
            self._check_progress()
        self.statistics.ended(world.now_s, world.num_events, self.network.num_messages)
        return self.statistics

    def _check_progress(self) -> None:
        """Jobs go on, if those who were there all the while, with whole disks, have room for all,
        and are a majority of the voters of each."""
        scenario, now_s = self.scenario, self.world.now_s
        stall_s = scenario.stall_s
        there = [
            name
            for name, since_s in self._disturbed_s.items()
            if now_s - since_s > stall_s
            and (machine := self.network.machines[name]).runs
            and not machine.disk.is_damaged
        ]
        needed = sum(job.stages * job.slots for job in scenario.jobs)
        if len(there) * scenario.swarm.slots_per_node < needed:
            return
        for job in self.manifests:
            idle_s = now_s - self._commit_s.get(job, 0.0)
            is_able = self.invariants.is_majority(job, there)
            if idle_s > stall_s and is_able and not self.is_done(job):
                raise Violation(f"nothing was committed for {idle_s:.0f} s: {self._stand()}")

    def _why_not_done(self) -> str:
        budget_s = self.scenario.budget_s
        return f"not done {budget_s:.0f} s after the last fault: {self._stand()}"

    def _stand(self) -> str:
        """Where the jobs are that are not done."""
        texts = []
        for job in self.manifests:
            if self.is_done(job):
                continue
            committed = self.invariants.num_committed(job)
            for name, daemon in sorted(self.daemons.items()):
                runner = daemon.runners.get(job)
                if runner is not None and daemon.process.alive:
                    ledger = runner.ledger
                    texts.append(
                        f"job {job} ({committed} committed) is {ledger.phase} at {name}, "
                        f"generation {ledger.generation}: {ledger.reason}"
                    )
        return "; ".join(texts)


def _facts(section: JobSection) -> ModelFacts:
    return ModelFacts(section.stages, 1000, 500, 500, 16, 300, 128, False)


def _manifest(section: JobSection, owner: str, seed: int, number: int) -> Manifest:
    return Manifest(
        name=f"{section.name}-{number}",
        batch=BatchConfig(rows=1, sequence_length=8, num_microbatches=section.microbatches),
        codecs=CodecConfig(follow_links=section.swinging_links),
        placement=PlacementConfig(stages=section.stages, slots=section.slots, min_peers=1),
        run=RunConfig(
            steps=section.steps,
            seed=seed,
            checkpoint_every=section.checkpoint_every,
            evaluate_every=section.evaluate_every,
            evaluate_microbatches=section.slots,
        ),
        model=ModelContent(config={}),
        data=DataContent(train=_BLOB, validation=_BLOB),
        tokenizer=_BLOB,
        submitter=PeerId(owner),
        submitted_at_s=0.0,
    )
