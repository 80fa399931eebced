"""One job on this node: fetches what its slots need, owns the worker child, relays its messages."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from swarmnode.children import Child, python_module, spawn_child
from swarmnode.domain import BlobRef, Generation, JobId, PeerId, Plan
from swarmnode.errors import ChildError, ProtocolError, SwarmError
from swarmnode.manifest import Manifest
from swarmnode.messages import (
    MAX_LINK_REPORTS,
    Applied,
    Assign,
    Begin,
    Busy,
    Commit,
    Configure,
    Configured,
    Evaluated,
    Export,
    Exported,
    Failed,
    Frame,
    LinkBroken,
    LinkReport,
    Message,
    Placed,
    Ready,
    Release,
    Save,
    Saved,
    SentKind,
    SessionClose,
    SessionFailed,
    SessionFrame,
    SessionToken,
    StateSource,
    Traffic,
)
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.blobs import BlobClient
from swarmnode.p2p.ports import Stream
from swarmnode.p2p.session import Conversation
from swarmnode.p2p.states import TensorIndex, index_tensors, write_safetensors
from swarmnode.p2p.switch import Switch, TensorMessage
from swarmnode.tensorfiles import read_header
from swarmnode.tokens import TokenIndex
from swarmnode.wire import pack, unpack

REPORT_S = 5.0
"""Seconds of computing after which the coordinator is told, also in the middle of a step."""


@dataclass(frozen=True)
class HostTools:
    """What every job on a node shares."""

    me: PeerId
    directory: Path
    """Where jobs keep their files, one folder each."""
    store: BlobStore
    blobs: BlobClient
    switch: Switch
    device: str
    num_threads: int
    on_sent: Callable[[str, int], None]
    on_compute: Callable[[float], None]
    links: Callable[[], tuple[LinkReport, ...]] = tuple
    """What this node has measured of its links."""


class JobHost:
    """The slots of one job on this node, for as long as its coordinator talks to us."""

    def __init__(self, manifest: Manifest, canonical: bytes, tools: HostTools) -> None:
        self.manifest = manifest
        self.plan: Plan | None = None
        self._canonical = canonical
        self._tools = tools
        self._directory = tools.directory / manifest.job
        self._child: Child | None = None
        self._conversation: Conversation | None = None
        self._group: asyncio.TaskGroup | None = None
        self._assigning: asyncio.Task[None] | None = None
        self._compute_s = 0.0
        self._control_bytes = 0
        self._files: dict[int, list[Path]] = {}

    @property
    def job(self) -> JobId:
        return self.manifest.job

    @property
    def child_pid(self) -> int | None:
        return self._child.pid if self._child else None

    async def run(self, stream: Stream, assign: Assign) -> None:
        """Serve the coordinator at the other end of `stream` until it leaves or releases us."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._conversation = Conversation(stream, self.job, self._on_message, self._on_control)
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                await self._on_message(assign, memoryview(self._canonical))
                with contextlib.suppress(_ReleasedError):
                    await self._conversation.run()
                raise _ReleasedError
        except* _ReleasedError:
            pass
        finally:
            self._tools.switch.leave(self.job, worker=True)
            if self._child is not None:
                await asyncio.shield(self._child.stop(grace_s=2.0))
            for path in self._directory.glob("*.safetensors"):
                self._tools.store.drop_ranges(path)
                path.unlink(missing_ok=True)

    # ---- from the coordinator --------------------------------------------------------------

    async def _on_message(self, message: Message, _payload: memoryview) -> None:
        assert self._group is not None
        match message:
            case Assign():
                if message.plan.coordinator != self.manifest.submitter or not message.plan.is_whole:
                    raise ProtocolError("an assignment by somebody else, or of half a plan")
                if self._assigning is not None:
                    self._assigning.cancel()
                self._assigning = self._group.create_task(
                    self._assign(message), name=f"assign {self.job}"
                )
            case Begin() | Commit():
                await self._to_child(message)
            case Save(generation=generation, step=step, stage=stage):
                path = self._directory / f"stage-{stage}-step-{step}.safetensors"
                await self._to_child(Export(self.job, generation, step, stage, str(path)))
            case Release():
                raise _ReleasedError
            case _:
                raise ProtocolError(f"a coordinator does not send {type(message).__name__}")

    async def _assign(self, assign: Assign) -> None:
        """Fetch what the new slots need, then make the child ready for the generation."""
        plan = assign.plan
        self.plan = plan
        self._tools.switch.join(
            self.job, plan, to_worker=self._on_tensor, on_broken=self._on_broken
        )
        try:
            await self._fetch_data(plan)
            sources = [
                (stage, *await self._fetch_state(plan, stage, source, assign.step))
                for stage, source in assign.sources
            ]
            if self._child is None:
                self._start_child()
            tools = self._tools
            configure = Configure(
                job=self.job,
                peer=tools.me,
                plan=plan,
                step=assign.step,
                sources=tuple(sources),
                blob_directory=str(tools.store.root),
                num_threads=tools.num_threads,
                device=tools.device,
            )
            await self._to_child(configure, self._canonical)
        except (SwarmError, OSError) as error:
            self._post(Failed(self.job, plan.generation, f"{error}"[:1000]))

    async def _fetch_data(self, plan: Plan) -> None:
        """The first stage reads tokens and the last one labels: both need the data."""
        stages = {at.stage for at in plan.hosted_by(self._tools.me)}
        data = self.manifest.data
        if data is None or not stages & {0, plan.num_stages - 1}:
            return
        providers = [plan.coordinator]
        for ref in (data.train, data.validation):
            await self._fetch([ref], plan, providers)
            index = TokenIndex.parse(self._tools.store.read(ref))
            await self._fetch(index.chunks, plan, providers)

    async def _fetch_state(
        self, plan: Plan, stage: int, source: StateSource, step: int
    ) -> tuple[Literal["keep", "init", "load"], str]:
        """Bring one stage's state here: how the child gets it, and the file if it loads one."""
        if source.how != "fetch":
            return source.how, ""
        if source.index is None:
            raise ProtocolError("a state to fetch has no index")
        await self._fetch([source.index], plan, source.providers)
        index = TensorIndex.from_json(self._tools.store.read(source.index))
        start, stop = plan.layers[stage]
        is_edge = stage in (0, plan.num_stages - 1)
        index = index.pick(lambda name: _is_wanted(name, start, stop, is_edge))
        await self._fetch(index.chunks(), plan, source.providers)
        path = self._directory / f"fetched-{stage}-{step}-{plan.generation}.safetensors"
        await asyncio.to_thread(write_safetensors, path, index.tensors, self._tools.store.read)
        if plan.coordinator != self._tools.me:  # there they may be a checkpoint's
            for ref in (source.index, *index.chunks()):
                self._tools.store.remove(ref)
        return "load", str(path)

    async def _fetch(
        self,
        refs: list[BlobRef] | tuple[BlobRef, ...],
        plan: Plan,
        providers: list[PeerId] | tuple[PeerId, ...],
    ) -> None:
        from_peers = [(peer, plan.addresses.get(peer, ())) for peer in providers]
        await self._tools.blobs.fetch_all(self.job, refs, from_peers)

    # ---- the child -------------------------------------------------------------------------

    def _start_child(self) -> None:
        assert self._group is not None
        self._child = spawn_child(
            python_module("swarmnode.worker.engine"),
            env={"OMP_NUM_THREADS": str(self._tools.num_threads), "TOKENIZERS_PARALLELISM": "0"},
            name=f"worker child of job {self.job}",
            log=self._directory / "worker.log",
        )
        self._group.create_task(self._read_child(self._child), name=f"child of {self.job}")

    async def _to_child(self, message: Message, payload: bytes | memoryview = b"") -> None:
        if self._child is None:
            return
        with contextlib.suppress(ChildError):  # _read_child reports it
            await self._child.send(pack(message), payload)

    async def _on_tensor(
        self, message: TensorMessage, payload: bytes | bytearray | memoryview
    ) -> None:
        if self._child is not None:
            with contextlib.suppress(ChildError):
                await self._child.send(pack(message), payload)

    async def _read_child(self, child: Child) -> None:
        try:
            while True:
                message, payload = unpack(await child.receive())
                await self._from_child(message, payload)
        except ChildError as error:
            self._child = None
            generation = self.plan.generation if self.plan else Generation(0)
            self._post(Failed(self.job, generation, str(error)[:1000]))
            await child.stop(grace_s=0.1)

    async def _from_child(self, message: Message, payload: memoryview) -> None:
        assert self._group is not None
        match message:
            case Frame() | SessionFrame() | SessionToken() | SessionFailed() | SessionClose():
                await self._tools.switch.send(message, payload)
            case Ready() | Evaluated():
                self._post(message)
                self._post_traffic()
            case Applied() | Failed():
                self._post(message)
            case Configured(generation=generation, step=step):
                self._drop_fetched(generation)
                self._post(Placed(self.job, generation, step))
            case Exported():
                self._group.create_task(self._publish(message), name=f"publish {message.path}")
            case Busy(compute_s=compute_s):
                self._compute_s += compute_s
                self._tools.on_compute(compute_s)
                if self._compute_s > REPORT_S:  # a long step: say that we are at it
                    self._post_traffic()
            case _:
                raise ProtocolError(f"the child does not send {type(message).__name__}")

    async def _publish(self, exported: Exported) -> None:
        """Serve an exported state in chunks; of each stage the last two exports are kept."""
        path = Path(exported.path)
        try:
            spans = read_header(path)
            index, ranges = await asyncio.to_thread(index_tensors, spans, exported.step)
            self._tools.store.add_ranges(ranges)
            ref = await asyncio.to_thread(self._tools.store.put, index.to_json())
        except (SwarmError, OSError) as error:
            self._post(Failed(self.job, exported.generation, f"cannot publish: {error}"))
            return
        kept = [file for file in self._files.get(exported.stage, []) if file != path] + [path]
        for earlier in kept[:-2]:
            self._tools.store.drop_ranges(earlier)
            earlier.unlink(missing_ok=True)
        self._files[exported.stage] = kept[-2:]
        self._post(Saved(self.job, exported.generation, exported.step, exported.stage, ref))

    def _drop_fetched(self, generation: Generation) -> None:
        """The child has read its files: they are no longer needed."""
        for path in self._directory.glob("fetched-*.safetensors"):
            if path.stem.endswith(f"-{generation}"):
                path.unlink(missing_ok=True)

    # ---- to the coordinator ----------------------------------------------------------------

    def _post(self, message: Message) -> None:
        if self._conversation is not None:
            self._conversation.post(message)

    def _post_traffic(self) -> None:
        sent: dict[SentKind, int] = self._tools.switch.sent(self.job)
        sent["control"] = self._control_bytes
        self._post(Traffic(self.job, sent, self._compute_s, self._links()))
        self._compute_s = 0.0

    def _links(self) -> tuple[LinkReport, ...]:
        """Our paths to the other peers of the plan, as far as they were measured."""
        if self.plan is None:
            return ()
        reports = [link for link in self._tools.links() if self.plan.names(link.peer)]
        return tuple(reports[:MAX_LINK_REPORTS])

    def _on_control(self, num_bytes: int) -> None:
        self._control_bytes += num_bytes
        self._tools.on_sent("control", num_bytes)

    def _on_broken(self, peer: PeerId, reason: str) -> None:
        if self.plan is not None:
            self._post(LinkBroken(self.job, self.plan.generation, peer, reason[:1000]))


class _ReleasedError(Exception):
    """The coordinator does not need us any more."""


def _is_wanted(name: str, start: int, stop: int, is_edge: bool) -> bool:
    """Whether a stage of layers [start, stop) needs the tensor `name`.

    The first number in a dotted name is its layer; names without one belong to the embeddings,
    the final norm or the head, which only the first and the last stage hold.
    """
    for part in name.partition("::")[0].split("."):
        if part.isdecimal():
            return start <= int(part) < stop
    return is_edge
