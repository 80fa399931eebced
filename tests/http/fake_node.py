"""A small honest node: real submissions, watches and a deterministic model of one byte a token."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from swarmnode.domain import JobId, PeerId
from swarmnode.errors import (
    BusyError,
    CapacityError,
    ManifestError,
    NotFoundError,
    PeerLostError,
)
from swarmnode.http.api import (
    CheckpointView,
    JobView,
    ModelView,
    NodeView,
    PeerView,
    Token,
    Work,
)
from swarmnode.http.server import serve
from swarmnode.manifest import parse_job
from swarmnode.p2p.checkpoint_files import Audit
from swarmnode.session_messages import (
    Sampling,
)
from swarmnode.telemetry import Metrics

JOB = JobId("00112233aabbccdd")
TOKEN = "a-token-of-32-hexadecimal-digits"


@dataclass
class ByteModel:
    """Says `script` over and over, one byte a token, after any prompt."""

    script: bytes = "Ahoj sv\u011bte! \U0001f642 ok. ".encode()
    name: str = "tiny"
    job: JobId = JOB
    created_s: float = 1_700_000_000.0
    max_positions: int = 256
    chat_template: str | None = None
    end_tokens: frozenset[int] = frozenset({256})

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


def a_job(**changes: Any) -> JobView:
    view = JobView(
        job=JOB, name="tiny", kind="train", phase="training", reason="", step=3, num_steps=10,
        loss=4.2, first_loss=5.5, val_loss=None, step_s=0.5, predicted_step_s=0.4,
        bound_step_s=0.3, tokens_per_s=2048.0,
        tokens_total=3072, elapsed_s=1.5, bytes_by_kind={"activation": 1000, "reduced": 500},
        generation=2, recoveries=1, recovery_s=0.75, killed_peers=(PeerId("12D3KooWB"),),
        placement=((PeerId("12D3KooWA"),), (PeerId("12D3KooWC"),)), layers=((0, 2), (2, 4)),
        plan_reasons=("stage 0 on 12D3KooWA: fastest",), plan_verdict="", checkpoint_step=2,
        losses=(5.5, 4.9, 4.2),
    )  # fmt: skip
    return replace(view, **changes)


@dataclass
class FakeNode:
    """Implements NodeApi over a dictionary of jobs; a test reads what happened to it."""

    model_: ByteModel = field(default_factory=ByteModel)
    jobs_: dict[str, JobView] = field(default_factory=lambda: {JOB: a_job()})
    end_after: int | None = None
    """The model says its end token after this many tokens."""
    fail_after: int | None = None
    """The route breaks after this many tokens."""
    pause_after: int | None = None
    """The model says nothing more after this many tokens."""
    notes_: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    """What is wrong with the checkpoint."""
    prompts: list[tuple[list[int], int, Sampling]] = field(default_factory=list)
    num_open: int = 0
    pid: int = 1
    end: Callable[[], None] = lambda: None
    """What happens when it is asked to end."""
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def node(self) -> NodeView:
        return NodeView(
            peer=PeerId("12D3KooWA"), version="0.1.0", home="/home/someone/.swarmnode",
            join_address="/ip4/192.0.2.1/tcp/4001/p2p/12D3KooWA",
            transport_addresses=("/ip4/192.0.2.1/tcp/4001/p2p/12D3KooWA",),
            http_address="http://127.0.0.1:8080", uptime_s=12.5, num_peers=3, device="a cpu",
            hosted=(f"{JOB} 0/0",), pids={"daemon": self.pid}, dropped={"stale_frame": 2},
        )  # fmt: skip

    def finish(self) -> None:
        self.end()

    def peers(self) -> tuple[PeerView, ...]:
        return tuple(
            PeerView(
                peer=PeerId(f"12D3KooW{letter}"), addresses=(), device="a cpu", kind="cpu",
                flops={"float32": 5e10}, memory_bytes_per_s=1e10, memory_total_bytes=8 << 30,
                memory_free_bytes=4 << 30, num_cores=2, version="0.1.0", expires_in_s=20.0,
                is_self=letter == "A",
            )
            for letter in "ABC"
        )  # fmt: skip

    def jobs(self) -> tuple[JobView, ...]:
        return tuple(self.jobs_.values())

    def job(self, job: str) -> JobView:
        for view in self.jobs_.values():
            if view.name == job or view.job.startswith(job):
                return view
        raise NotFoundError(f"no job {job!r}; `swarmnode jobs` lists them")

    async def submit(self, raw: dict[str, Any], base: Path) -> JobId:
        job = parse_job(raw, base=base, source="the job")
        if any(view.name == job.name for view in self.jobs_.values()):
            raise ManifestError(f"the job: name {job.name!r} is taken")
        self.jobs_["ffff000011112222"] = a_job(job=JobId("ffff000011112222"), name=job.name)
        return JobId("ffff000011112222")

    async def watch(self, job: str) -> AsyncIterator[JobView]:
        while True:
            view = self.job(job)
            yield view
            if view.phase in ("serving", "failed", "stopped"):
                return
            await self.changed.wait()
            self.changed.clear()

    def change(self, **changes: Any) -> None:
        self.jobs_[JOB] = replace(self.jobs_[JOB], **changes)
        self.changed.set()

    async def stop(self, job: str) -> None:
        self.change(phase="stopped")

    async def export(self, job: str, directory: Path) -> int:
        await asyncio.to_thread(self._write, directory)
        return self.job(job).step

    def _write(self, directory: Path) -> None:
        if directory.exists() and any(directory.iterdir()):
            raise BusyError(f"{directory} is not empty")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text("{}")

    def notes(self, job: str) -> tuple[str, ...]:
        return self.notes_

    async def checkpoints(self, job: str) -> tuple[CheckpointView, ...]:
        view = self.job(job)
        hashes = ("a" * 64, "b" * 64)
        signer = "12D3KooWA"
        return (CheckpointView(view.step, 1, 1.7e9, 4.2, 6, 3 << 20, *hashes, None, signer),)

    async def verify_checkpoints(self, job: str) -> AsyncIterator[Work]:
        step = self.job(job).step
        yield Work(1 << 20, 3 << 20)
        yield Work(3 << 20, 3 << 20, audits=(Audit(step, "a" * 64, self.problems),))

    async def export_checkpoint(
        self, job: str, directory: Path, step: int | None
    ) -> AsyncIterator[Work]:
        if step is not None and step != self.job(job).step:
            raise NotFoundError(f"no checkpoint after step {step}")
        yield Work(1 << 20, 3 << 20)
        await asyncio.to_thread(self._write, directory)
        yield Work(3 << 20, 3 << 20, step=self.job(job).step)

    def models(self) -> tuple[ModelView, ...]:
        return (self.model_,)

    async def model(self, name: str) -> ModelView:
        if name not in (self.model_.name, self.model_.job):
            raise NotFoundError(f"no model {name!r} is served here")
        return self.model_

    async def generate(
        self, model: ModelView, prompt: list[int], max_tokens: int, sampling: Sampling
    ) -> AsyncGenerator[Token, None]:
        if self.num_open:
            raise CapacityError("another conversation is in progress")
        self.num_open += 1
        self.opened.set()
        self.prompts.append((prompt, max_tokens, sampling))
        try:
            for num, byte in enumerate(itertools.islice(itertools.cycle(self.script), max_tokens)):
                if num == self.end_after:
                    return
                if num == self.fail_after:
                    raise PeerLostError("12D3KooWC", "stream broke")
                if num == self.pause_after:
                    await asyncio.Event().wait()
                top = tuple((byte + i, -0.5 - i) for i in range(sampling.num_logprobs))
                await asyncio.sleep(0)
                yield Token(byte, -0.5, top)
        finally:
            self.num_open -= 1
            self.closed.set()

    @property
    def script(self) -> bytes:
        return self.model_.script


@asynccontextmanager
async def served(node: FakeNode, metrics: Metrics) -> AsyncIterator[tuple[str, asyncio.Task[None]]]:
    """The address of a real server, and its task, which is cancelled at the end."""
    bound: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(serve(node, metrics, TOKEN, "127.0.0.1", 0, bound.set_result))
        yield f"http://127.0.0.1:{await bound}", task
        task.cancel()
