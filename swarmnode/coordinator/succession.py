"""Ready to take over: follows the journals of jobs that others coordinate, and stands for election.

Whoever loses a coordinator waits in the order of the plan's voters: the coordinator may be
restarted, and the first that stands usually wins.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable

from swarmnode.coordinator.events import CheckpointRecord, EndRecord
from swarmnode.coordinator.retention import keep_state
from swarmnode.coordinator.standby import StandbyJournals
from swarmnode.coordinator.tokenizer_check import check_tokenizer
from swarmnode.domain import BlobRef, JobId, PeerId, Plan
from swarmnode.errors import SwarmError
from swarmnode.home import KEPT_S
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.blobs import BlobClient, Provider
from swarmnode.papers import Papers
from swarmnode.tokens import TokenIndex

PATIENCE_S = 8.0
"""A dead coordinator that is started again by then goes on itself."""
NEXT_S = 3.0
"""Each further voter waits so much longer."""
HEIR_S = 0.5
"""Whom a leaving coordinator names waits so long: all others are to have heard of it too, as who
still hears a coordinator promises nobody else anything."""
VAIN_S, MAX_VAIN_S = 4.0, 600.0
"""Who gave way to another candidate, and is followed by nobody, waits so much longer before it
stands once more; twice as long each time, at most MAX_VAIN_S."""
NUM_STANDBYS = 2
"""Voters after the coordinator that also keep what a coordinator needs besides the journal."""
PROVIDE_AGAIN_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Pauses of a standby after it could not fetch what it needs."""
MAX_EARLY_BYTES = 128 << 20
"""Of all jobs together whose first plan has not come yet: anybody can begin one. A newcomer to a
long job is told the whole journal before the plan that names it."""


class Succession:
    """For every job that this node works for: what to do once its coordinator is gone."""

    def __init__(
        self,
        me: PeerId,
        journals: StandbyJournals,
        store: BlobStore,
        blobs: BlobClient,
        papers: Callable[[JobId], Papers | None],
        take_over: Callable[[Papers], Awaitable[None]],
        forget: Callable[[JobId | None], bool],
        stand_by: Callable[[JobId], None],
        group: asyncio.TaskGroup,
        log: Callable[..., None],
    ) -> None:
        self._me = me
        self._journals = journals
        self._store = store
        self._blobs = blobs
        self._papers = papers
        self._take_over = take_over
        self._forget = forget
        self._stand_by = stand_by
        self._group = group
        self._log = log
        self._waiting: dict[JobId, asyncio.Task[None]] = {}
        self._followed: set[JobId] = set()
        """Jobs of which somebody who coordinates, or may, talks to us."""
        self._named: set[JobId] = set()
        """Jobs whose coordinator left and named us."""
        self._num_vain: Counter[JobId] = Counter()
        """How often this node gave way since somebody did."""
        self._providing: dict[JobId, asyncio.Task[None]] = {}
        """What fetches all that a coordinator of the job needs."""
        self._outdated: set[JobId] = set()
        """Jobs of which something new may be needed."""
        self._kept: dict[JobId, CheckpointRecord] = {}
        """The newest checkpoint that is here, by job."""
        self._loadable: set[BlobRef] = set()
        """Tokenizers of which a child has seen that they can be loaded."""
        self._early: Counter[JobId] = Counter()
        """Bytes of journals that came before a plan, by job."""

    # ---- what workers report ---------------------------------------------------------------

    def followed(self, job: JobId) -> None:
        """Somebody who coordinates the job, or may, talks to us: if it goes too, we hear of it."""
        self._followed.add(job)
        self._named.discard(job)
        self._num_vain.pop(job, None)
        self._stop_waiting(job)

    def adopted(self, job: JobId, plan: Plan) -> None:
        """A voter keeps at hand what it needs to take over."""
        if self._is_standby(plan):
            self._provide_soon(job)

    async def entry(self, job: JobId, number: int, lines: bytes) -> None:
        """Keep lines of a journal, unless they are too many. Raises: OSError."""
        papers = self._papers(job)
        if papers is not None and papers.plan.coordinator == self._me:
            return
        if papers is not None:
            self._early.pop(job, None)
        elif self._early.total() + len(lines) > MAX_EARLY_BYTES:
            return
        records = await asyncio.to_thread(self._journals.take, job, number, lines)
        if papers is None:  # the first lines come before the first plan that we adopt
            self._early[job] += len(lines) if records else 0
        if any(isinstance(record, EndRecord) for record in records):
            self._stop_waiting(job)
            self._group.create_task(self._retire(job), name=f"end of {job}")
        elif papers is not None and any(isinstance(each, CheckpointRecord) for each in records):
            if self._is_standby(papers.plan):
                self._provide_soon(job)
            else:  # what it had as a standby is replaced
                forget = asyncio.to_thread(self._forget, None)
                self._group.create_task(forget, name=f"replaced of {job}")

    def named(self, job: JobId) -> None:
        """The coordinator leaves, and wants this node to go on."""
        self._named.add(job)

    def orphaned(self, job: JobId) -> None:
        """The coordinator's stream broke: unless somebody comes, stand for election.

        Without a plan nobody can stand, and whoever comes tells the journal from its first line.
        """
        self._followed.discard(job)
        papers = self._papers(job)
        if papers is None and self._early.pop(job, 0):
            self._journals.drop(job)
        self._wait(job, papers)

    def handed_over(self, job: JobId) -> None:
        """This node has left the job to another candidate. If nobody talks to us, nobody's end will
        tell that this one did not win either: stand again."""
        if job not in self._followed:
            self._num_vain[job] += 1
            self._wait(job, self._papers(job), vain_s(self._num_vain[job]))

    def _wait(self, job: JobId, papers: Papers | None, longer_s: float = 0.0) -> None:
        if papers is None or self._me not in papers.plan.voters or job in self._waiting:
            return
        rank = papers.plan.voters.index(self._me)
        if rank > 0:
            wait_s = PATIENCE_S + NEXT_S * (rank - 1) + longer_s
            if job in self._named:
                self._named.remove(job)
                wait_s = HEIR_S
            task = self._group.create_task(self._stand(job, wait_s), name=f"succession of {job}")
            self._waiting[job] = task

    async def sweep(self, now_s: float) -> None:
        """Retire what was left when an earlier life ended with its job, and journals to which
        nothing came for KEPT_S, of jobs in which this node has no part any more."""
        for job in await asyncio.to_thread(self._journals.ended):
            await self._retire(job)
        for job in await asyncio.to_thread(self._journals.unchanged_since, now_s - KEPT_S):
            with contextlib.suppress(SwarmError):  # what we have in hand cannot be read now
                if self._papers(job) is None:
                    await self._retire(job)

    async def num_lines(self, job: JobId) -> int:
        """Lines of the job's journal that we have."""
        return await asyncio.to_thread(self._journals.num_lines, job)

    def _stop_waiting(self, job: JobId) -> None:
        task = self._waiting.pop(job, None)
        if task is not None:
            task.cancel()

    def _is_standby(self, plan: Plan) -> bool:
        return self._me in plan.voters[1 : 1 + NUM_STANDBYS]

    # ---- tasks -----------------------------------------------------------------------------

    async def _stand(self, job: JobId, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        del self._waiting[job]
        try:
            papers = self._papers(job)
            if papers is None or not await self.num_lines(job):
                return
            self._log("stands for election", job=job, generation=papers.plan.generation)
            await self._have_tokenizer(papers)
            await self._take_over(papers)
        except Exception as error:  # of a stranger's making, perhaps: the other jobs go on
            self._log("cannot take over", job=job, reason=str(error))
            with contextlib.suppress(SwarmError):
                self.handed_over(job)  # perhaps later

    def _provide_soon(self, job: JobId) -> None:
        self._outdated.add(job)
        if job not in self._providing:
            task = self._group.create_task(self._provide(job), name=f"stand by for {job}")
            self._providing[job] = task

    async def _provide(self, job: JobId) -> None:
        """Have what every coordinator gives out, and the newest complete state; and say so."""
        try:
            waits = iter(PROVIDE_AGAIN_S)
            while job in self._outdated:
                self._outdated.discard(job)
                try:
                    papers = self._papers(job)
                    if papers is not None and self._is_standby(papers.plan):
                        await self._have_all(papers)
                        self._stand_by(job)
                except Exception as error:  # as in `_stand`
                    self._log("not ready to take over", job=job, reason=str(error))
                    wait_s = next(waits, None)
                    if wait_s is not None:
                        await asyncio.sleep(wait_s)
                        self._outdated.add(job)
        finally:
            del self._providing[job]

    async def _have_all(self, papers: Papers) -> None:
        manifest = papers.manifest
        await self._have_newest(papers)
        await self._have_tokenizer(papers)
        for ref in (manifest.data.train, manifest.data.validation) if manifest.data else ():
            await self._fetch(papers, [ref])
            await self._fetch(papers, list(TokenIndex.parse(self._store.read(ref)).chunks))

    async def _have_tokenizer(self, papers: Papers) -> None:
        """Fetch it, and load it elsewhere first; once for each, as that takes a second."""
        ref = papers.manifest.tokenizer
        if not self._store.has(ref):
            await self._fetch(papers, [ref])
        if ref not in self._loadable:
            await check_tokenizer(self._store.read(ref))
            self._loadable.add(ref)

    async def _have_newest(self, papers: Papers) -> None:
        """Have the newest checkpoint too; of the others as many stay as the coordinator keeps."""
        job, providers = papers.manifest.job, self._providers(papers.plan)
        newest = await asyncio.to_thread(self._journals.newest_checkpoint, job)
        if newest is None or newest == self._kept.get(job):
            return
        for ref in newest.indexes:
            await keep_state(job, ref, providers, self._blobs, self._store)
        self._kept[job] = newest
        await asyncio.to_thread(self._forget, None)

    async def _retire(self, job: JobId) -> None:
        """Delete what only this journal names, and then the journal."""
        try:
            if (providing := self._providing.get(job)) is not None:
                providing.cancel()
                await asyncio.wait([providing])  # what came here still would be named by nobody
            self._kept.pop(job, None)
            if await asyncio.to_thread(self._forget, job):
                await asyncio.to_thread(self._journals.drop, job)
        except Exception as error:  # as in `_stand`
            self._log("journal not dropped", job=job, reason=str(error))

    async def _fetch(self, papers: Papers, refs: list[BlobRef]) -> None:
        await self._blobs.fetch_all(papers.manifest.job, refs, self._providers(papers.plan))

    def _providers(self, plan: Plan) -> list[Provider]:
        named = [peer for peer in (plan.coordinator, *plan.workers()) if peer != self._me]
        return [(peer, plan.addresses.get(peer, ())) for peer in dict.fromkeys(named)]


def vain_s(num_vain: int) -> float:
    """How much longer who gave way so often in a row waits before it stands again."""
    return min(VAIN_S * 2.0 ** min(num_vain - 1, 16), MAX_VAIN_S)
