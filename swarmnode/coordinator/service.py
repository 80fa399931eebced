"""The coordinator side of a node: takes jobs, runs them, brings them back after a restart."""

import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from swarmnode.coordinator import events as on
from swarmnode.coordinator.checkpoints import CheckpointDesk
from swarmnode.coordinator.head import Head
from swarmnode.coordinator.journal import Journal, read_journal
from swarmnode.coordinator.ledger import Ledger
from swarmnode.coordinator.retention import Retention, chunks_of
from swarmnode.coordinator.room import full_disk, when_there_is_room
from swarmnode.coordinator.runner import JobRunner, RunnerTools
from swarmnode.coordinator.solver.fill import solve
from swarmnode.coordinator.solver.request import GridRequest, Swarm
from swarmnode.coordinator.standby import JOURNAL_FILE, StandbyJournals
from swarmnode.coordinator.submission import FactsOf, prepare, unpack_folder
from swarmnode.coordinator.tenure import Tenure
from swarmnode.domain import JobId, ModelFacts, PeerId, Plan
from swarmnode.errors import NotFoundError, SwarmError
from swarmnode.home import write_durably
from swarmnode.manifest import JobFile, Manifest, PlacementConfig, check, parse_job
from swarmnode.p2p.identity import Identity
from swarmnode.p2p.session import first_error
from swarmnode.p2p.states import (
    MOMENT_SUFFIXES,
    IndexedTensor,
    TensorIndex,
    index_tensors,
    write_safetensors,
)
from swarmnode.papers import Papers
from swarmnode.tensorfiles import read_header
from swarmnode.tokenizer import TextTokenizer, load_tokenizer

JOB_FILE, LEASE_FILE, TOKENIZER_FOLDER = "job.json", "lease", "tokenizer"
OpenFiles = tuple[Ledger, Journal, Tenure]


@dataclass
class RunningJob:
    """A job that this node coordinates, with what serving it needs."""

    runner: JobRunner
    manifest: Manifest
    facts: ModelFacts
    directory: Path
    tokenizer: TextTokenizer
    head: Head
    notes: tuple[str, ...] = ()
    """What its submitter should know, a line each."""

    @property
    def ledger(self) -> Ledger:
        return self.runner.ledger

    @property
    def tokenizer_directory(self) -> Path:
        return self.directory / TOKENIZER_FOLDER


class CoordinatorService:
    """Every job that was submitted to this node."""

    def __init__(
        self,
        identity: Identity,
        directory: Path,
        tools: RunnerTools,
        group: asyncio.TaskGroup,
        facts_of: FactsOf,
    ) -> None:
        self._identity = identity
        self._directory = directory
        self._group = group
        self._facts_of = facts_of
        self._jobs: dict[JobId, RunningJob] = {}
        self.checkpoints = CheckpointDesk(identity, tools.store, lambda: self.jobs, tools.log)
        self.standby = StandbyJournals(directory / "standby")
        self.retention = Retention(
            tools.store, directory, lambda: self.jobs, self.checkpoints, self.standby, tools.log
        )
        self._tools = replace(tools, on_checkpoint=self.retention.forget)

    @property
    def jobs(self) -> tuple[RunningJob, ...]:
        """Every job, the newest last."""
        return tuple(sorted(self._jobs.values(), key=lambda job: job.manifest.submitted_at_s))

    def find(self, name: str) -> RunningJob:
        """By id, by a prefix of one id, or by name (the newest). Raises: NotFoundError."""
        if JobId(name) in self._jobs:
            return self._jobs[JobId(name)]
        named = [job for job in self.jobs if job.manifest.name == name]
        if named:
            return named[-1]
        matching = [
            job for key, job in self._jobs.items() if len(name) >= 4 and key.startswith(name)
        ]
        if len(matching) == 1:
            return matching[0]
        known = ", ".join(f"{job.manifest.job} ({job.manifest.name})" for job in self.jobs)
        raise NotFoundError(f"no job {name!r:.80} here; known: {known or 'none'}")

    def names(self, peer: PeerId, job: JobId) -> bool:
        """Whether a job of ours has `peer` among its workers, or will have."""
        running = self._jobs.get(job)
        if running is None:
            return False
        plan = running.ledger.plan
        return (plan is not None and plan.names(peer)) or peer in running.ledger.newcomers

    # ---- taking jobs -----------------------------------------------------------------------

    async def submit(self, raw: dict[str, Any], base: Path) -> JobId:
        """Check a job description, store what it names, and start it.

        Raises: ManifestError, DataError, CapacityError, each with one clear line.
        """
        job = parse_job(raw, base=base, source="job")
        self._directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._directory, prefix=".submit-") as scratch:
            prepared = await prepare(
                job,
                self._identity.peer,
                self._tools.store,
                Path(scratch),
                self._facts_of,
                self._decide_grid,
            )
        manifest, facts = prepared.manifest, prepared.facts
        solve(self._tools.peers(), facts, manifest)  # refuses now what could not start
        canonical = manifest.canonical()
        directory = self._directory / manifest.job
        directory.mkdir(parents=True)
        signature = self._identity.sign(canonical)
        self._write_job(directory, canonical, signature, facts, job.model.path or job.model.resume)
        self._start(manifest, facts, signature, directory)
        self._jobs[manifest.job].notes = prepared.notes
        return manifest.job

    async def _decide_grid(self, job: JobFile, facts: ModelFacts) -> PlacementConfig:
        """What the job leaves open of its grid, for who is here; the solver decides."""
        wish = job.placement
        swarm = Swarm(self._tools.peers()).settled()
        if wish.stages and wish.slots and (wish.layers or swarm.is_even(job.run.compute)):
            return PlacementConfig(**wish.model_dump(exclude_none=True))
        return await self._tools.solver.decide_grid(GridRequest(swarm, facts, job.open))

    async def restore(self) -> None:
        """Start again every job that an earlier life of this node had not ended."""
        for path in sorted(self._directory.glob(f"*/{JOB_FILE}")):
            try:
                start = await self._saved(path)
                try:
                    start()
                except (SwarmError, OSError) as error:
                    if (full := full_disk(error)) is None:
                        raise
                    waiting = self._start_later(path.parent, full, start)
                    self._group.create_task(waiting, name=f"room for {path.parent.name}")
            except Exception as error:  # of a stranger's making, perhaps: the other jobs go on
                self._tools.log("job not restored", path=str(path), reason=str(error))
        self._group.create_task(self.checkpoints.run(), name="checkpoints")

    async def _saved(self, path: Path) -> Callable[[], None]:
        """How to start what `_write_job` wrote. Raises: SwarmError, OSError, ValueError, KeyError,
        TypeError."""
        saved = json.loads(path.read_text(encoding="utf-8"))
        manifest = check(Manifest, saved["manifest"], str(path))
        facts = ModelFacts(**saved["facts"])
        if manifest.model.weights is not None and saved["weights_path"]:
            await asyncio.to_thread(self._offer_weights, Path(saved["weights_path"]))
        signature = bytes.fromhex(saved["signature"])
        return partial(self._start, manifest, facts, signature, path.parent)

    async def _start_later(
        self, directory: Path, failure: OSError, start: Callable[[], None]
    ) -> None:
        """Start a job as soon as its disk has room for what that writes."""
        job = JobId(directory.name)

        async def say(reason: str) -> None:
            self._tools.log("job waits for room", job=job, reason=reason)

        def start_once() -> None:
            if job not in self._jobs:  # it may have been taken over meanwhile
                start()

        try:
            await when_there_is_room(directory, failure, start_once, say)
        except Exception as error:  # as in `restore`
            self._tools.log("job not restored", path=str(directory), reason=str(error))

    def num_lines(self, job: JobId) -> int:
        """Lines of the journal of a job that is coordinated here; else 0."""
        running = self._jobs.get(job)
        return 0 if running is None or running.ledger.is_over else running.runner.num_lines

    def led(self, unfollowed: Set[JobId]) -> tuple[JobId, ...]:
        """Jobs that are coordinated here, with those of `unfollowed`: nobody came for them yet."""
        jobs = [job.ledger for job in self.jobs]
        return tuple(led.job for led in jobs if not led.is_over or led.job in unfollowed)

    def take_over(self, papers: Papers) -> None:
        """Stand for election as the coordinator of a job whose own is gone.

        Raises: SwarmError, OSError if we lack what a coordinator needs.
        """
        job = papers.manifest.job
        running = self._jobs.get(job)
        if running is not None and not running.ledger.is_over:
            return
        source = self.standby.path(job)
        first = next(
            (r for r in read_journal(source)[0] if isinstance(r, on.SubmittedRecord)), None
        )
        if first is None:
            raise SwarmError(f"the journal of job {job} has not arrived")
        directory = self._directory / job
        directory.mkdir(parents=True, exist_ok=True)
        write_durably(directory / JOURNAL_FILE, source.read_bytes())
        write_durably(directory / LEASE_FILE, papers.lease)
        self._write_job(directory, papers.canonical, papers.signature, first.facts, None)
        self._start(papers.manifest, first.facts, papers.signature, directory)

    def _write_job(
        self,
        directory: Path,
        canonical: bytes,
        signature: bytes,
        facts: ModelFacts,
        weights_path: str | None,
    ) -> None:
        saved = {
            "manifest": json.loads(canonical),
            "signature": signature.hex(),
            "facts": asdict(facts),
            "weights_path": weights_path,
        }
        write_durably(directory / JOB_FILE, json.dumps(saved, indent=1).encode())

    def _offer_weights(self, folder: Path) -> None:
        """Serve the folder that a job started from again; without it a checkpoint must do."""
        try:
            _, ranges = index_tensors(read_header(folder), 0)
        except (SwarmError, OSError) as error:
            self._tools.log("weights not offered again", path=str(folder), reason=str(error))
        else:
            self._tools.store.add_ranges(ranges)

    def _start(
        self, manifest: Manifest, facts: ModelFacts, signature: bytes, directory: Path
    ) -> None:
        store, switch = self._tools.store, self._tools.switch
        tokenizer_directory = directory / TOKENIZER_FOLDER
        unpack_folder(store.read(manifest.tokenizer), tokenizer_directory)
        tokenizer = load_tokenizer(tokenizer_directory)
        open_files = partial(self._open_files, manifest, facts, signature, directory)
        runner = JobRunner(*open_files(), manifest.canonical(), self._tools)

        def serving_plan() -> Plan | None:
            ledger = runner.ledger
            is_placed = ledger.phase in ("training", "evaluating", "saving", "serving")
            return ledger.plan if is_placed else None

        head = Head(manifest.job, switch, serving_plan)
        self._jobs[manifest.job] = RunningJob(runner, manifest, facts, directory, tokenizer, head)
        self._group.create_task(
            self._run(runner, directory, open_files), name=f"job {manifest.job}"
        )

    def _open_files(
        self, manifest: Manifest, facts: ModelFacts, signature: bytes, directory: Path
    ) -> OpenFiles:
        """A job as its files tell it."""
        me = self._identity.peer
        tenure = Tenure(
            directory / LEASE_FILE, manifest.job, manifest.submitter, me, self._identity.sign
        )
        journal = Journal(directory / JOURNAL_FILE)
        try:
            if not journal.found:
                journal.append(on.SubmittedRecord(facts))
            ledger = Ledger(manifest, facts, me, signature, time.monotonic())
            ledger.restore(self._readable(journal.found))
        except BaseException:
            journal.close()
            raise
        return ledger, journal, tenure

    async def _run(
        self, runner: JobRunner, directory: Path, open_files: Callable[[], OpenFiles]
    ) -> None:
        """Run one job; whatever goes wrong with it stays its own affair.

        While the disk is full it waits, and then goes on from what its journal says. A job that
        ends here without a record in its journal is taken up again at the next start.
        """
        job = runner.ledger.job

        async def say(reason: str) -> None:
            self._tools.log("job waits for room", job=job, reason=reason)
            await runner.pause(f"waits for room on its disk: {reason}")

        try:
            while (failure := await _run_until_full(runner)) is not None:
                await when_there_is_room(
                    directory, failure, lambda: runner.go_on(*open_files()), say
                )
                self._tools.log("job goes on", job=job)
            ledger = runner.ledger
            if ledger.successor is not None:
                if ledger.manifest.submitter != self._identity.peer:
                    (directory / JOB_FILE).unlink(missing_ok=True)
                self._tools.on_handed_over(job)
        except Exception as error:  # a broken disk, or a bug of ours: the node's other jobs go on
            cause = first_error(error) if isinstance(error, BaseExceptionGroup) else error
            self._tools.log("job gave up", job=job, reason=str(cause))
            try:
                reason = f"{type(cause).__name__}: {cause}; restart the node to go on"
                await runner.give_up(reason)
            except Exception as other:  # its figures cannot even be shown
                self._tools.log("job not shown", job=job, reason=str(other))

    def _readable(self, records: Sequence[on.Record]) -> list[on.Record]:
        """The journal without checkpoints of which a chunk is gone or damaged.

        What so far is a piece of our own worker's files, or only borrowed, is kept from here on.
        """
        store, kept = self._tools.store, []
        for record in records:
            if isinstance(record, on.CheckpointRecord):
                try:
                    store.own(chunks_of(store, [record]))
                except SwarmError:
                    continue
            kept.append(record)
        return kept

    async def stop(self, name: str) -> None:
        """End a job: release its workers, keep its checkpoints."""
        job = self.find(name)
        if not job.ledger.is_over:
            await job.runner.tell(on.StopAsked("stopped by its owner"))

    # ---- giving weights back ---------------------------------------------------------------

    async def export_weights(self, job: RunningJob, path: Path) -> int:
        """Write the newest complete weights as one safetensors file of canonical tensors.

        Returns the committed steps that they hold. Raises: NotFoundError if there are none yet.
        """
        store, checkpoint = self._tools.store, job.ledger.checkpoint
        if checkpoint is not None:
            step, refs = checkpoint.step, checkpoint.indexes
        elif job.manifest.model.weights is not None:
            step, refs = job.manifest.start_step, (job.manifest.model.weights,)
        else:
            every = job.manifest.run.checkpoint_every or job.manifest.num_steps
            raise NotFoundError(
                f"job {job.manifest.job} has no checkpoint yet; the first one is made after "
                f"step {min(every, job.manifest.num_steps)}"
            )
        tensors: dict[str, IndexedTensor] = {}
        for ref in refs:
            index = TensorIndex.from_json(store.read(ref))
            for tensor in index.tensors:
                if not tensor.name.endswith(MOMENT_SUFFIXES):
                    tensors.setdefault(tensor.name, tensor)
        await asyncio.to_thread(write_safetensors, path, tensors.values(), store.read)
        return step


async def _run_until_full(runner: JobRunner) -> OSError | None:
    """Run a job: None once it is over, or the error if the disk is full."""
    try:
        await runner.run()
    except Exception as error:
        failure = full_disk(error)
        if failure is None:
            raise
        return failure
    return None
