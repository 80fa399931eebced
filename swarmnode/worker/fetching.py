"""What an assignment needs of other peers: data, states and updates, by content."""

import asyncio
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from swarmnode.domain import BlobRef, JobId, PeerId, Plan
from swarmnode.errors import ChunkError, ProtocolError, RefusedError, SwarmError
from swarmnode.failpoints import hit
from swarmnode.manifest import DataContent
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.blobs import BlobClient
from swarmnode.p2p.states import TensorIndex, write_safetensors
from swarmnode.threads import in_thread
from swarmnode.tokens import TokenIndex
from swarmnode.updates import UpdateIndex
from swarmnode.worker.handoff import Update
from swarmnode.worker.training.log import UpdateLog

Read = Callable[[BlobRef], bytes]
RETRY_S = (0.25, 0.5, 1.0, 2.0)
"""Waits between attempts while all refuse: a peer may not have heard of the new plan yet."""


class Fetcher:
    """Fetches for one job under one plan.

    Pieces of what becomes a file of its own are only borrowed: they go again, unless they are
    somebody else's too, such as a checkpoint's that is stored here meanwhile.
    """

    def __init__(
        self,
        job: JobId,
        plan: Plan,
        me: PeerId,
        store: BlobStore,
        blobs: BlobClient,
        on_chunk: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_chunk` is called for each chunk that has come."""
        self._job = job
        self._plan = plan
        self._me = me
        self._store = store
        self._blobs = blobs
        self._on_chunk = on_chunk

    async def data(self, data: DataContent) -> None:
        """Bring the token streams here: from the coordinator, or from any worker that has them."""
        for ref in (data.train, data.validation):
            await self._fetch([ref], [self._plan.coordinator])
            index = TokenIndex.parse(self._store.read(ref))
            await self._fetch(index.chunks, [self._plan.coordinator])

    async def sample_index(self, data: DataContent) -> None:
        """Bring here what says which samples there are, without the text."""
        await self._fetch([data.train], [self._plan.coordinator])

    async def state(
        self, index_ref: BlobRef, providers: Sequence[PeerId], stage: int, path: Path
    ) -> None:
        """Write the tensors that `stage` needs of a state to the file `path`.

        Who borrowed the same chunks for something else may give them back meanwhile.
        """
        for is_last in (False, False, True):
            try:
                await self._state(index_ref, providers, stage, path)
                return
            except ChunkError:
                if is_last:
                    raise

    async def _state(
        self, index_ref: BlobRef, providers: Sequence[PeerId], stage: int, path: Path
    ) -> None:
        await self._fetch([index_ref], providers, is_borrowed=True)
        index = TensorIndex.from_json(self._store.read(index_ref))
        start, stop = self._plan.layers[stage]
        is_edge = stage in (0, self._plan.num_stages - 1)
        index = index.pick(lambda name: is_wanted(name, start, stop, is_edge))
        await self._fetch(index.chunks(), providers, _hit_half_way, is_borrowed=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write = partial(write_safetensors, path, index.tensors, is_checkable=True)
        await self._in_thread(write)
        await self._in_thread(partial(self._give_back, [index_ref, *index.chunks()]))

    async def updates(
        self, updates: Sequence[Update], providers: Sequence[PeerId], log: UpdateLog
    ) -> None:
        """Put committed updates into the own log.

        Raises: ProtocolError if an index is not one of its step.
        """
        refs = [update.ref for update in updates]
        await self._fetch(refs, providers, is_borrowed=True)
        indexes: list[UpdateIndex] = []
        for update in updates:
            index = UpdateIndex.from_json(await asyncio.to_thread(self._store.read, update.ref))
            if index.step != update.step:
                raise ProtocolError(f"the update of step {update.step} says step {index.step}")
            indexes.append(index)
        chunks = [chunk for index in indexes for chunk in index.chunks]
        await self._fetch(chunks, providers, _hit_half_way, is_borrowed=True)
        for index in indexes:
            await self._in_thread(partial(_log, index, log))
        await self._in_thread(partial(self._give_back, [*refs, *chunks]))

    def _give_back(self, refs: Sequence[BlobRef], _read: Read) -> None:
        self._store.give_back(refs)

    async def _in_thread(self, write: Callable[[Read], None]) -> None:
        """Let a thread write what it reads of the store with what it is given.

        Whoever is cancelled meanwhile ends when the thread has: it stops at its next chunk.
        """
        is_given_up = threading.Event()

        def read(ref: BlobRef) -> bytes:
            if is_given_up.is_set():
                raise SwarmError("nobody waits for this any more")
            return self._store.read(ref)

        await in_thread(write, read, on_cancel=is_given_up.set)

    async def _fetch(
        self,
        refs: Sequence[BlobRef],
        providers: Sequence[PeerId],
        progress: Callable[[int, int], None] | None = None,
        *,
        is_borrowed: bool = False,
    ) -> None:
        """From `providers`, and if they fail from anybody in the plan."""

        def told(done_bytes: int, total_bytes: int) -> None:
            self._on_chunk()
            if progress is not None:
                progress(done_bytes, total_bytes)

        first = list(dict.fromkeys(peer for peer in providers if peer != self._me))
        everybody = dict.fromkeys((*first, self._plan.coordinator, *self._plan.workers()))
        rest = [peer for peer in everybody if peer != self._me]
        rounds = [peers for peers in (first, rest) if peers] or [[]]
        waits = iter(RETRY_S)
        while True:
            failure: SwarmError | None = None
            for peers in rounds:
                try:
                    await self._blobs.fetch_all(
                        self._job, refs, self._known(peers), told, is_borrowed=is_borrowed
                    )
                    return
                except SwarmError as error:
                    failure = error
            assert failure is not None
            delay_s = next(waits, None) if isinstance(failure, RefusedError) else None
            if delay_s is None:
                raise failure
            await asyncio.sleep(delay_s)

    def _known(self, peers: Iterable[PeerId]) -> list[tuple[PeerId, Sequence[str]]]:
        return [(peer, self._plan.addresses.get(peer, ())) for peer in peers]


def _log(index: UpdateIndex, log: UpdateLog, read: Read) -> None:
    ref = log.write(index.step, [read(chunk) for chunk in index.chunks])
    assert ref == index.ref, "every chunk was checked against its hash"


def _hit_half_way(done_bytes: int, total_bytes: int) -> None:
    if 2 * done_bytes >= total_bytes > 0:
        hit("joining")


def is_wanted(name: str, start: int, stop: int, is_edge: bool) -> bool:
    """Whether a stage of layers [start, stop) needs the tensor `name`.

    The first number in a dotted name is its layer; names without one belong to the embeddings,
    the final norm or the head, which only the first and the last stage hold.
    """
    for part in name.partition("::")[0].split("."):
        if part.isdecimal():
            return start <= int(part) < stop
    return is_edge
