"""The coordinator side of a node: takes jobs, runs them, brings them back after a restart."""

import asyncio
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from swarmnode.coordinator import events as on
from swarmnode.coordinator.checkpoints import CheckpointDesk
from swarmnode.coordinator.head import Head
from swarmnode.coordinator.job_files import (
    JOB_FILE,
    LEASE_FILE,
    TOKENIZER_FOLDER,
    JobFiles,
    OpenFiles,
)
from swarmnode.coordinator.journal import JournalDamagedError, read_whole_journal, set_aside
from swarmnode.coordinator.ledger import Ledger
from swarmnode.coordinator.retention import Retention
from swarmnode.coordinator.room import full_disk, when_there_is_room
from swarmnode.coordinator.runner import JobRunner, RunnerTools
from swarmnode.coordinator.solver.fill import solve
from swarmnode.coordinator.solver.request import GridRequest, Swarm
from swarmnode.coordinator.standby import JOURNAL_FILE, StandbyJournals
from swarmnode.coordinator.submission import FactsOf, prepare
from swarmnode.domain import JobId, ModelFacts, PeerId, Plan
from swarmnode.errors import NotFoundError, SwarmError
from swarmnode.home import make_folder, sync_folder, write_durably
from swarmnode.manifest import JobFile, Manifest, PlacementConfig, parse_job
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
from swarmnode.threads import in_thread
from swarmnode.tokenizer import TextTokenizer


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
        self._opening: defaultdict[JobId, asyncio.Lock] = defaultdict(asyncio.Lock)
        """Held while a thread writes or opens a job's files, and while they are deleted."""
        self._reading: dict[JobId, asyncio.Event] = {}
        """Jobs of earlier lives: each is set once it goes on here, or is known not to."""
        self._is_listed = asyncio.Event()
        self._not_restored: dict[JobId, str] = {}
        """Jobs of earlier lives that do not go on here, and why."""
        self.checkpoints = CheckpointDesk(identity, tools.store, lambda: self.jobs, tools.log)
        self.standby = StandbyJournals(directory / "standby", tools.log)
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
        for key, reason in self._not_restored.items():
            if len(name) >= 4 and key.startswith(name):
                raise NotFoundError(f"job {key} was not restored: {reason}")
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

        Raises: ManifestError, DataError, CapacityError, SwarmError if the disk is full or broken,
        each with one clear line; nothing of the job is started then, nor later.
        """
        job = parse_job(raw, base=base, source="job")
        try:
            files, notes = await self._prepared(job)
            try:
                opened = await in_thread(self._laid_down, files)
            except asyncio.CancelledError:  # the node ends, and whoever asks is told so
                await asyncio.to_thread(shutil.rmtree, files.directory, ignore_errors=True)
                raise
        except OSError as error:
            path = error.filename or self._directory
            raise SwarmError(f"job not started: {path}: {error.strerror or error}") from error
        self._start(files, *opened)
        self._jobs[files.manifest.job].notes = notes
        return files.manifest.job

    async def _prepared(self, job: JobFile) -> tuple[JobFiles, tuple[str, ...]]:
        """What a job becomes, which is not on the disk yet, and what its submitter should know."""
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
        signature = self._identity.sign(manifest.canonical())
        weights = job.model.path or job.model.resume
        directory = self._directory / manifest.job
        return JobFiles(directory, manifest, signature, facts, weights), prepared.notes

    def _laid_down(self, files: JobFiles) -> tuple[TextTokenizer, OpenFiles]:
        """Write and open a new job's files; none stay if that fails.

        Raises: SwarmError, OSError.
        """
        files.directory.mkdir(parents=True)
        sync_folder(files.directory.parent)
        try:
            files.write()
            return self._opened(files)
        except BaseException:
            shutil.rmtree(files.directory, ignore_errors=True)
            raise

    async def _decide_grid(self, job: JobFile, facts: ModelFacts) -> PlacementConfig:
        """What the job leaves open of its grid, for who is here; the solver decides."""
        wish = job.placement
        swarm = Swarm(self._tools.peers()).settled()
        if wish.stages and wish.slots and (wish.layers or swarm.is_even(job.run.compute)):
            return PlacementConfig(**wish.model_dump(exclude_none=True))
        return await self._tools.solver.decide_grid(GridRequest(swarm, facts, job.open))

    async def restore(self) -> None:
        """Start again every job that an earlier life of this node had not ended."""
        paths = sorted(self._directory.glob(f"*/{JOB_FILE}"))
        self._reading = {JobId(path.parent.name): asyncio.Event() for path in paths}
        self._is_listed.set()
        for path, (job, is_read) in zip(paths, self._reading.items(), strict=True):
            try:
                files = await asyncio.to_thread(JobFiles.read, path.parent)
                if files.manifest.model.weights is not None and files.weights_path:
                    await asyncio.to_thread(self._offer_weights, Path(files.weights_path))
                try:
                    await self._take_up(files)
                except (SwarmError, OSError) as error:
                    if (full := full_disk(error)) is None:
                        raise
                    waiting = self._take_up_later(files, full)
                    self._group.create_task(waiting, name=f"room for {job}")
            except Exception as error:  # of a stranger's making, perhaps: the other jobs go on
                self._leave_out(job, error)
            finally:
                is_read.set()
        self._group.create_task(self.checkpoints.run(), name="checkpoints")

    async def _take_up(self, files: JobFiles) -> None:
        """Go on with a job of an earlier life, unless it has been taken over meanwhile."""
        job = files.manifest.job
        async with self._opening[job]:
            if job not in self._jobs:
                self._start(files, *await asyncio.to_thread(self._opened, files))

    async def _take_up_later(self, files: JobFiles, failure: OSError) -> None:
        """Go on with a job as soon as its disk has room for what that writes."""
        job = files.manifest.job

        async def say(reason: str) -> None:
            self._tools.log("job waits for room", job=job, reason=reason)

        try:
            await when_there_is_room(files.directory, failure, partial(self._take_up, files), say)
        except Exception as error:  # as in `restore`
            self._leave_out(job, error)

    def _leave_out(self, job: JobId, error: Exception) -> None:
        """What an earlier life left of a job cannot be used: its voters go on without this node."""
        self._not_restored[job] = str(error)
        path = str(self._directory / job)
        self._tools.log("job not restored", path=path, reason=str(error))

    async def num_lines(self, job: JobId) -> int:
        """Lines of the journal of a job that is coordinated here, as soon as that is known; else
        0."""
        await self._is_listed.wait()
        if job in self._reading:
            await self._reading[job].wait()
        running = self._jobs.get(job)
        return 0 if running is None or running.ledger.is_over else running.runner.num_lines

    def led(self, unfollowed: Set[JobId]) -> tuple[JobId, ...]:
        """Jobs that are coordinated here, with those of `unfollowed`: nobody came for them yet."""
        jobs = [job.ledger for job in self.jobs]
        return tuple(led.job for led in jobs if not led.is_over or led.job in unfollowed)

    async def take_over(self, papers: Papers) -> None:
        """Stand for election as the coordinator of a job whose own is gone.

        Raises: SwarmError, OSError if we lack what a coordinator needs.
        """
        job = papers.manifest.job
        async with self._opening[job]:
            running = self._jobs.get(job)
            if running is None or running.ledger.is_over:
                self._start(*await asyncio.to_thread(self._inherited, papers))

    def _inherited(self, papers: Papers) -> tuple[JobFiles, TextTokenizer, OpenFiles]:
        """The files of a job that others coordinated, with our copy of its journal."""
        job = papers.manifest.job
        source = self.standby.path(job)
        records, _ = read_whole_journal(source)
        first = next((r for r in records if isinstance(r, on.SubmittedRecord)), None)
        if first is None:
            raise SwarmError(f"the journal of job {job} has not arrived")
        directory = self._directory / job
        make_folder(directory)
        journal = directory / JOURNAL_FILE
        try:
            read_whole_journal(journal)  # of an earlier life, in which we coordinated it
        except (JournalDamagedError, OSError):
            set_aside(journal)
        write_durably(journal, source.read_bytes())
        write_durably(directory / LEASE_FILE, papers.lease)
        files = JobFiles(directory, papers.manifest, papers.signature, first.facts)
        files.write()
        return files, *self._opened(files)

    def _offer_weights(self, folder: Path) -> None:
        """Serve the folder that a job started from again; without it a checkpoint must do."""
        try:
            _, ranges = index_tensors(read_header(folder), 0)
        except (SwarmError, OSError) as error:
            self._tools.log("weights not offered again", path=str(folder), reason=str(error))
        else:
            self._tools.store.add_ranges(ranges)

    def _opened(self, files: JobFiles) -> tuple[TextTokenizer, OpenFiles]:
        """What a runner needs; waits for the disk. Raises: SwarmError, OSError."""
        store = self._tools.store
        return files.tokenizer(store), files.open(self._identity, store)

    def _start(self, files: JobFiles, tokenizer: TextTokenizer, opened: OpenFiles) -> None:
        manifest, tools = files.manifest, self._tools
        runner = JobRunner(*opened, manifest.canonical(), tools)

        def serving_plan() -> Plan | None:
            ledger = runner.ledger
            is_placed = ledger.phase in ("training", "evaluating", "saving", "serving")
            return ledger.plan if is_placed else None

        head = Head(manifest.job, tools.switch, serving_plan)
        job = RunningJob(runner, manifest, files.facts, files.directory, tokenizer, head)
        self._jobs[manifest.job] = job
        self._not_restored.pop(manifest.job, None)
        self._group.create_task(self._run(runner, files), name=f"job {manifest.job}")

    async def _run(self, runner: JobRunner, files: JobFiles) -> None:
        """Run one job; whatever goes wrong with it stays its own affair.

        While the disk is full it waits, and then goes on from what its journal says. A job that
        ends here without a record in its journal is taken up again at the next start.
        """
        job = runner.ledger.job

        async def say(reason: str) -> None:
            self._tools.log("job waits for room", job=job, reason=reason)
            await runner.pause(f"waits for room on its disk: {reason}")

        async def again() -> None:
            opened = await asyncio.to_thread(files.open, self._identity, self._tools.store)
            runner.go_on(*opened)

        try:
            while (failure := await _run_until_full(runner)) is not None:
                await when_there_is_room(files.directory, failure, again, say)
                self._tools.log("job goes on", job=job)
            async with self._opening[job]:  # what is taken over meanwhile has files of its own
                if runner.ledger.successor is not None and self._jobs[job].runner is runner:
                    if files.manifest.submitter != self._identity.peer:
                        (files.directory / JOB_FILE).unlink(missing_ok=True)
                    self._tools.on_handed_over(job)
        except Exception as error:  # a broken disk, or a bug of ours: the node's other jobs go on
            cause = first_error(error) if isinstance(error, BaseExceptionGroup) else error
            self._tools.log("job gave up", job=job, reason=str(cause))
            try:
                reason = f"{type(cause).__name__}: {cause}; restart the node to go on"
                if isinstance(cause, JournalDamagedError):  # that would not help
                    reason = str(cause)
                await runner.give_up(reason)
            except Exception as other:  # its figures cannot even be shown
                self._tools.log("job not shown", job=job, reason=str(other))

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
