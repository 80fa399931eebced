"""One node as its HTTP API sees it: the verbs of `http.api.NodeApi` over the node's services."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swarmnode import __version__
from swarmnode.coordinator.ledger import Ledger
from swarmnode.coordinator.service import CoordinatorService, RunningJob
from swarmnode.domain import Advert, JobId
from swarmnode.errors import BusyError, DataError, NotFoundError, SwarmError
from swarmnode.http.api import (
    CheckpointView,
    CoarserLink,
    JobView,
    ModelView,
    NodeView,
    PeerView,
    Token,
    Work,
)
from swarmnode.http.work import Counted, checkpoint_view
from swarmnode.p2p.identity import Identity
from swarmnode.session_messages import (
    Sampling,
)
from swarmnode.worker.service import WorkerService, slots_of

ExportModel = Callable[[Mapping[str, Any], Path, Path, Path], Awaitable[None]]
MOVE_S = 30.0
"""Whoever asks a model of a job that is just placed anew waits so long for it."""


@dataclass(frozen=True)
class ServedModel:
    """A served job, as the OpenAI API names it."""

    running: RunningJob

    @property
    def name(self) -> str:
        return self.running.manifest.name

    @property
    def job(self) -> JobId:
        return self.running.manifest.job

    @property
    def created_s(self) -> float:
        return self.running.manifest.submitted_at_s

    @property
    def max_positions(self) -> int:
        return self.running.facts.max_positions

    @property
    def chat_template(self) -> str | None:
        return self.running.tokenizer.chat_template

    def encode(self, text: str) -> list[int]:
        return self.running.tokenizer.encode(text)

    def decode(self, tokens: list[int]) -> str:
        return self.running.tokenizer.decode(tokens)

    @property
    def end_tokens(self) -> frozenset[int]:
        return frozenset(self.running.tokenizer.end_ids)


@dataclass
class Node:
    """Implements `NodeApi`."""

    identity: Identity
    home: Path
    join_address: str
    transport_addresses: tuple[str, ...]
    device: str
    coordinator: CoordinatorService
    worker: WorkerService
    adverts: Callable[[], tuple[Advert, ...]]
    pids: Callable[[], Mapping[str, int]]
    export_model: ExportModel
    dropped: Counter[str]
    http_address: str = ""
    finish: Callable[[], None] = lambda: None
    """Ask the node to give its work to others and end."""
    started_s: float = field(default_factory=time.monotonic)

    def node(self) -> NodeView:
        me = self.identity.peer
        return NodeView(
            peer=me,
            version=__version__,
            home=str(self.home),
            join_address=self.join_address,
            transport_addresses=self.transport_addresses,
            http_address=self.http_address,
            uptime_s=time.monotonic() - self.started_s,
            num_peers=len(self.adverts()),
            device=self.device,
            hosted=slots_of(self.worker.hosts(), me),
            pids=self.pids(),
            dropped=dict(sorted(self.dropped.items())),
        )

    def peers(self) -> tuple[PeerView, ...]:
        now_s = time.time()
        return tuple(
            PeerView(
                peer=advert.peer,
                addresses=advert.addresses,
                device=advert.device.name,
                kind=advert.device.kind,
                flops=dict(advert.device.flops),
                memory_bytes_per_s=advert.device.memory_bytes_per_s,
                memory_total_bytes=advert.device.memory_total_bytes,
                memory_free_bytes=advert.device.memory_free_bytes,
                num_cores=advert.device.num_cores,
                version=advert.version,
                expires_in_s=advert.expires_at_s - now_s,
                is_self=advert.peer == self.identity.peer,
            )
            for advert in self.adverts()
        )

    # ---- jobs ------------------------------------------------------------------------------

    def jobs(self) -> tuple[JobView, ...]:
        return tuple(job_view(job.ledger, with_losses=False) for job in self.coordinator.jobs)

    def job(self, job: str) -> JobView:
        return job_view(self.coordinator.find(job).ledger)

    async def submit(self, raw: dict[str, Any], base: Path) -> JobId:
        return await self.coordinator.submit(raw, base)

    async def watch(self, job: str) -> AsyncIterator[JobView]:
        running = self.coordinator.find(job)
        seen = 0
        while True:
            view = job_view(running.ledger, with_losses=False)
            yield view
            if view.phase in ("serving", "failed", "stopped", "handed over"):
                return
            seen = await running.runner.changed(seen)

    async def stop(self, job: str) -> None:
        await self.coordinator.stop(job)

    async def export(self, job: str, directory: Path) -> int:
        running = self.coordinator.find(job)
        if not directory.is_absolute() or "\0" in str(directory):
            raise DataError(f"{str(directory)!r:.80} is no absolute path to export to")
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise BusyError(f"{directory} exists and is not empty; give a new folder")
        weights = running.directory / f"export-{time.monotonic_ns()}.safetensors"
        try:
            step = await self.coordinator.export_weights(running, weights)
            await self.export_model(
                running.manifest.model.config, weights, running.tokenizer_directory, directory
            )
        except OSError as error:
            raise SwarmError(f"cannot export to {directory}: {error.strerror}") from error
        finally:
            weights.unlink(missing_ok=True)
        return step

    # ---- checkpoints -----------------------------------------------------------------------

    def notes(self, job: str) -> tuple[str, ...]:
        return self.coordinator.find(job).notes

    async def checkpoints(self, job: str) -> tuple[CheckpointView, ...]:
        running = self.coordinator.find(job)
        listed = await self.coordinator.checkpoints.listed(running)
        return tuple(checkpoint_view(each) for each in listed)

    async def verify_checkpoints(self, job: str) -> AsyncIterator[Work]:
        running, desk = self.coordinator.find(job), self.coordinator.checkpoints
        counted = Counted(await desk.num_bytes(running))
        audits = asyncio.ensure_future(desk.audited(running, counted.add))
        async for work in counted.until(audits):
            yield work
        yield Work(counted.total, counted.total, audits=audits.result())

    async def export_checkpoint(
        self, job: str, directory: Path, step: int | None
    ) -> AsyncIterator[Work]:
        running, desk = self.coordinator.find(job), self.coordinator.checkpoints
        if not directory.is_absolute() or "\0" in str(directory):
            raise DataError(f"{str(directory)!r:.80} is no absolute path to export to")
        checkpoint = await desk.find(running, step)
        counted = Counted(checkpoint.manifest.num_bytes)
        task = asyncio.ensure_future(desk.exported(running, checkpoint, directory, counted.add))
        async for work in counted.until(task):
            yield work
        task.result()
        yield Work(counted.total, counted.total, step=checkpoint.manifest.step)

    # ---- serving ---------------------------------------------------------------------------

    def models(self) -> tuple[ModelView, ...]:
        newest = {job.manifest.name: job for job in self.coordinator.jobs if _serves(job)}
        return tuple(ServedModel(job) for job in newest.values())

    async def model(self, name: str) -> ModelView:
        running = self.coordinator.find(name)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MOVE_S):
                seen = 0
                while running.ledger.phase in ("placing", "waiting"):
                    seen = await running.runner.changed(seen)
        if not _serves(running):
            raise NotFoundError(
                f"job {name} is {running.ledger.phase}, it serves nothing now; see `swarmnode jobs`"
            )
        return ServedModel(running)

    async def generate(
        self, model: ModelView, prompt: list[int], max_tokens: int, sampling: Sampling
    ) -> AsyncIterator[Token]:
        running = self.coordinator.find(model.job)
        vocabulary = running.facts.vocab_size
        if any(not 0 <= token < vocabulary for token in prompt):
            raise DataError(f"a token of the prompt is outside the vocabulary of {vocabulary}")
        answers = running.head.generate(prompt, max_tokens, model.max_positions, sampling)
        try:
            async for answer in answers:
                if answer.token in model.end_tokens:
                    return
                yield Token(answer.token, answer.logprob, answer.top)
        finally:
            await answers.aclose()


def _serves(job: RunningJob) -> bool:
    return job.ledger.phase in ("training", "evaluating", "saving", "serving")


def job_view(ledger: Ledger, *, with_losses: bool = True) -> JobView:
    """A job's figures as people see them."""
    progress, plan, manifest = ledger.progress, ledger.plan, ledger.manifest
    losses = progress.shown_losses
    is_placed = plan is not None and not ledger.is_over
    return JobView(
        job=ledger.job,
        name=manifest.name,
        kind=manifest.kind,
        phase=ledger.phase,
        reason=ledger.reason,
        step=ledger.step,
        num_steps=manifest.num_steps,
        loss=losses[-1] if losses else None,
        first_loss=losses[0] if losses else None,
        val_loss=progress.validation[-1][1] if progress.validation else None,
        step_s=progress.step_s,
        predicted_step_s=ledger.outlook.predicted_s,
        bound_step_s=plan.bound_s if plan and is_placed else None,
        tokens_per_s=progress.tokens_per_s if ledger.phase == "training" else None,
        tokens_total=ledger.step * progress.tokens_per_step,
        elapsed_s=time.monotonic() - progress.started_s,
        bytes_by_kind={str(kind): count for kind, count in progress.bytes_by_kind.items()},
        generation=ledger.generation,
        recoveries=progress.recoveries,
        recovery_s=progress.recovery_s,
        killed_peers=tuple(progress.killed),
        placement=plan.slots if plan and is_placed else (),
        layers=plan.layers if plan and is_placed else (),
        plan_reasons=plan.reasons if plan and is_placed else (),
        plan_verdict=ledger.replanning.verdict,
        checkpoint_step=ledger.checkpoint.step if ledger.checkpoint else None,
        losses=losses if with_losses else (),
        codecs=manifest.codecs.by_role,
        codings=progress.codings,
        val_codec=(progress.val_codec or manifest.codecs.evaluation)
        if progress.validation
        else None,
        coarser_links=tuple(CoarserLink(*link) for link in plan.links)
        if plan and is_placed
        else (),
    )
