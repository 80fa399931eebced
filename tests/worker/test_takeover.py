"""A worker outlives its coordinator, and its own daemon: who takes over goes on bit for bit."""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from engine_swarm import TIED, Swarm, make_manifest
from worker_node import (
    GOOD,
    ME,
    STRANGER,
    SUBMITTER,
    Node,
    answer,
    answered,
    ask,
    assign,
    inquire,
    node,
)

from swarmnode.domain import Generation, Plan
from swarmnode.errors import PeerLostError
from swarmnode.heartbeats import Ping
from swarmnode.manifest import Manifest
from swarmnode.messages import (
    Answer,
    Applied,
    Assign,
    Begin,
    Commit,
    Committed,
    Entry,
    Failed,
    Message,
    Placed,
    Ready,
    Release,
    Save,
    Saved,
    StateSource,
)
from swarmnode.p2p.identity import Identity
from swarmnode.p2p.ports import EndOfStream, Stream
from swarmnode.p2p.session import HEARTBEAT_S
from swarmnode.p2p.states import TensorIndex
from swarmnode.wire import pack
from swarmnode.worker import fetching
from swarmnode.worker.files import state_path
from swarmnode.worker.state_keeper import TENANCY_NAME

VOTERS = (SUBMITTER.peer, STRANGER.peer)
THIRD = Identity(b"t" * 32)


@pytest.fixture(autouse=True)
def _without_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "RETRY_S", ())


# ---- promises, without a child -----------------------------------------------------------------


async def test_a_promise_is_on_the_disk_before_it_is_told(tmp_path: Path) -> None:
    async with node(tmp_path) as n:
        stream = await ask(n, SUBMITTER, inquire(4, 0))
        found = await answered(stream)
        assert (found.granted, found.promised, found.promised_to) == (True, 4, SUBMITTER.peer)
        assert (found.held, found.ready) == ((), ())
        text = (tmp_path / "jobs" / GOOD.job / TENANCY_NAME).read_text()
        assert '"promised": 4' in text
    async with node(tmp_path) as n:  # the same disk, another life
        refused = await answered(await ask(n, SUBMITTER, inquire(3, 0)))
        assert (refused.granted, refused.promised) == (False, 4)
        assert n.dropped == {"fenced": 1}
        assert n.service.hosts() == ()
        assert (await answered(await ask(n, SUBMITTER, inquire(5, 0)))).granted


async def test_a_stranger_gets_no_promise_and_no_folder(tmp_path: Path) -> None:
    async with node(tmp_path) as n:
        refused = await answered(await ask(n, STRANGER, inquire(1, 0)))
        assert not refused.granted
        assert (refused.promised, refused.promised_to) == (0, SUBMITTER.peer)
        assert not (tmp_path / "jobs" / GOOD.job).exists()


async def test_a_damaged_tenancy_promises_nothing(tmp_path: Path) -> None:
    path = tmp_path / "jobs" / GOOD.job / TENANCY_NAME
    path.parent.mkdir(parents=True)
    path.write_text('{"promised": 1')
    async with node(tmp_path) as n:
        stream = await ask(n, SUBMITTER, inquire(1, 0))
        with pytest.raises((EndOfStream, PeerLostError)):
            await answer(stream)
        assert "damaged" in str((await n.logs("assignment refused"))["reason"])


async def test_while_the_coordinator_talks_nobody_takes_over(tmp_path: Path) -> None:
    async with node(tmp_path) as n:
        stream = await ask(n, SUBMITTER, inquire(1, 0))
        assert (await answered(stream)).granted
        plan = replace(assign().plan, voters=VOTERS)
        await stream.send(pack(assign(plan=plan)), GOOD.canonical())
        assert isinstance(await answer(stream), Failed)  # nobody has the data
        refused = await answered(await ask(n, STRANGER, inquire(2, 1)))
        assert (refused.granted, refused.promised, refused.promised_to) == (
            False, 1, SUBMITTER.peer,
        )  # fmt: skip
        await stream.reset()
        await n.logs("coordinator lost")
        taken = await answered(await ask(n, STRANGER, inquire(2, 1)))
        assert (taken.granted, taken.promised_to) == (True, STRANGER.peer)
        late = await answered(await ask(n, SUBMITTER, inquire(2, 1)))
        assert (late.granted, late.promised_to) == (False, STRANGER.peer)
        assert refused.in_touch
        assert late.in_touch
        assigned = await answered(await ask(n, SUBMITTER, assign(plan=plan)))
        assert not assigned.granted


async def test_a_promise_to_a_coordinator_that_is_gone_is_told_as_such(tmp_path: Path) -> None:
    async with node(tmp_path) as n:
        stream = await ask(n, SUBMITTER, inquire(1, 0))
        assert (await answered(stream)).granted
        plan = replace(assign().plan, voters=VOTERS)
        await stream.send(pack(assign(plan=plan)), GOOD.canonical())
        assert isinstance(await answer(stream), Failed)
        await stream.reset()
        await n.logs("coordinator lost")
        refused = await answered(await ask(n, STRANGER, inquire(1, 1)))
        assert (refused.granted, refused.promised_to) == (False, SUBMITTER.peer)
        assert not refused.in_touch


@pytest.mark.parametrize("is_over", [True, False])
async def test_who_was_told_that_the_job_has_ended_says_so(tmp_path: Path, is_over: bool) -> None:
    async with node(tmp_path) as n:
        stream = await ask(n, SUBMITTER, inquire(1, 0))
        assert not (await answered(stream)).is_over
        plan = replace(assign().plan, voters=VOTERS)
        await stream.send(pack(assign(plan=plan)), GOOD.canonical())
        assert isinstance(await answer(stream), Failed)
        await stream.send(pack(Release(GOOD.job, "done", is_over=is_over)))
        await n.logs("job left")
    async with node(tmp_path) as n:  # another life
        found = await answered(await ask(n, STRANGER, inquire(2, 1)))
        assert (found.is_over, found.granted) == (is_over, not is_over)


async def test_two_who_ask_at_once_are_not_both_promised(tmp_path: Path) -> None:
    async with node(tmp_path, verify_lease=lambda *_: True) as n:
        streams = [await ask(n, who, inquire(1, 0)) for who in (STRANGER, THIRD, SUBMITTER) * 3]
        answers = [await answered(stream) for stream in streams]
        winners = {found.promised_to for found in answers}
        assert len(winners) == 1
        granted = [found for found in answers if found.granted]
        assert 1 <= len(granted) <= 3


# ---- with a child ------------------------------------------------------------------------------


@dataclass
class Coordinator:
    """One end of a control stream; remembers what it commits."""

    stream: Stream
    job: Manifest
    generation: int
    commits: list[Committed]
    hashes: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.heartbeat = asyncio.create_task(self._ping())

    async def _ping(self) -> None:
        with contextlib.suppress(PeerLostError):
            while True:
                await self.tell(Ping(self.job.job))
                await asyncio.sleep(HEARTBEAT_S)

    async def tell(self, message: Message, payload: bytes = b"") -> None:
        await self.stream.send(pack(message), payload)

    async def receive(self, kind: type[Any]) -> Any:
        while True:
            found = await answer(self.stream)
            assert not isinstance(found, Failed), found.reason
            if isinstance(found, kind):
                return found

    async def assign(self, who: Identity, step: int, source: StateSource) -> None:
        plan = Plan(Generation(self.generation), ((0, 4),), ((ME.peer,),), who.peer, voters=VOTERS)
        message = Assign(
            self.job.job, plan, step, ((0, source),), SUBMITTER.sign(self.job.canonical()),
            tuple(self.commits),
        )  # fmt: skip
        await self.tell(message, self.job.canonical())
        placed = await self.receive(Placed)
        assert (placed.generation, placed.step) == (self.generation, step)

    async def prepare(self, step: int) -> Ready:
        await self.tell(Begin(self.job.job, Generation(self.generation), step))
        ready = await self.receive(Ready)
        assert isinstance(ready, Ready)
        return ready

    async def commit(self, ready: Ready, *, snapshot: bool = False) -> None:
        self.commits.append(Committed(ready.step, 1.0, (ready.update,)))
        fence = Generation(self.generation)
        await self.tell(Commit(self.job.job, fence, ready.step, 1.0, snapshot))
        self.hashes[ready.step] = (await self.receive(Applied)).state_hash


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("node")


@pytest.fixture(scope="module")
def job(blobs: Path) -> Manifest:
    found = make_manifest(blobs / "blobs", TIED, stages=1, slots=1, num_microbatches=2, clip_norm=0)
    return found.model_copy(update={"submitter": SUBMITTER.peer})


@pytest.fixture(scope="module")
def undisturbed(blobs: Path, job: Manifest) -> dict[int, str]:
    swarm = Swarm(job, [["a"]], blobs / "blobs", layers=((0, 4),), home=blobs / "swarm")
    swarm.configure()
    return {step: swarm.step(step).hashes[0] for step in range(6)}


@asynccontextmanager
async def lone_node(folder: Path, **hooks: Any) -> AsyncIterator[Node]:
    async with asyncio.timeout(100), node(folder, **hooks) as n:
        yield n


async def first_coordinator(n: Node, job: Manifest, generation: int = 1) -> Coordinator:
    shutil.rmtree(n.folder / "jobs", ignore_errors=True)  # promises of the test before
    stream = await ask(n, SUBMITTER, inquire(generation, 0, job), job)
    assert (await answered(stream)).granted
    return Coordinator(stream, job, generation, [])


@pytest.mark.processes
async def test_a_second_coordinator_takes_over_the_same_child_and_the_first_is_fenced(
    blobs: Path, job: Manifest, undisturbed: dict[int, str]
) -> None:
    heard: list[Any] = []

    async def keep(_job: str, number: int, lines: bytes) -> None:
        heard.append((number, lines))

    hooks = {
        "on_orphaned": lambda job: heard.append(("orphaned", job)),
        "on_adopted": lambda _, plan: heard.append(("adopted", plan.generation)),
        "on_entry": keep,
        "vote": lambda asked, who: f"{asked.generation}{who}".encode()[:64],
    }
    async with lone_node(blobs, **hooks) as n:
        first = await first_coordinator(n, job)
        await first.assign(SUBMITTER, 0, StateSource("init"))
        await first.tell(Entry(job.job, Generation(1), 7, b"line\n"))
        await first.commit(await first.prepare(0))
        said = await first.prepare(1)
        (host,) = n.service.hosts()
        pid = host.child_pid
        assert pid is not None
        await first.stream.reset()
        await n.logs("coordinator lost")
        assert heard == [("adopted", 1), (7, b"line\n"), ("orphaned", job.job)]

        stream = await ask(n, STRANGER, inquire(2, 1, job), job)
        found = await answered(stream)
        assert found.granted
        assert [each[:6] for each in found.held] == [(0, 0, 4, 1, 0, 2)]
        assert found.ready == (said,), "the step at hand need not be computed again"
        assert found.vote == f"2{STRANGER.peer}".encode()[:64]
        commits = [*first.commits, Committed(1, 1.0, (said.update,))]
        second = Coordinator(stream, job, 2, commits)
        await second.assign(STRANGER, 2, StateSource("keep", 1))
        assert host.child_pid == pid, "nothing was started anew"

        late = await answered(await ask(n, SUBMITTER, inquire(2, 1, job), job))
        assert (late.granted, late.promised_to) == (False, STRANGER.peer)
        await second.commit(await second.prepare(2))
        assert {**first.hashes, **second.hashes} == {s: undisturbed[s] for s in (0, 2)}
        await second.tell(Release(job.job, "done"))
        await n.logs("job left")
        left = sorted(path.name for path in (n.folder / "jobs" / job.job).iterdir())
        assert left == [TENANCY_NAME], "promises outlast the work, nothing else does"


@pytest.mark.processes
async def test_a_daemon_that_was_restarted_goes_on_from_its_disk(
    blobs: Path, job: Manifest, undisturbed: dict[int, str]
) -> None:
    async with lone_node(blobs) as n:
        first = await first_coordinator(n, job)
        await first.assign(SUBMITTER, 0, StateSource("init"))
        await first.commit(await first.prepare(0))
        await first.commit(await first.prepare(1))
        said = await first.prepare(2)  # but nobody here knows of a commit

    folder = blobs / "jobs" / job.job
    async with lone_node(blobs) as n:  # no snapshot yet: its own start and the log
        stream = await ask(n, SUBMITTER, inquire(2, 1, job), job)
        found = await answered(stream)
        assert [each[:6] for each in found.held] == [(0, 0, 4, 0, 0, 3)]
        assert found.ready == (said,), "it may have been committed elsewhere"
        assert n.service.hosts()[0].child_pid is None, "asking starts nothing"
        second = Coordinator(stream, job, 2, first.commits)
        await second.assign(SUBMITTER, 2, StateSource("keep"))
        assert not (folder / "stage-0" / "2.index").exists(), "it was not committed"
        await second.commit(await second.prepare(2), snapshot=True)
        assert not n.service.names(THIRD.peer, job.job)
        await second.tell(Save(job.job, Generation(2), 3, 0, readers=(THIRD.peer,)))
        saved = await second.receive(Saved)
        assert n.service.names(THIRD.peer, job.job), "it may fetch before a plan names it"
        assert saved.step == 3
        assert len(TensorIndex.from_json(n.store.read(saved.index)).tensors) > 10
        assert state_path(folder, 0, 3, "snapshot").exists()
        assert not state_path(folder, 0, 3, "export").exists(), "the snapshot is published"
        await second.commit(await second.prepare(3))
        await second.tell(Save(job.job, Generation(2), 4, 0))  # no snapshot of that step
        assert (await second.receive(Saved)).step == 4
        assert state_path(folder, 0, 4, "export").exists()

    (folder / "stage-0" / ".9.safetensors.1.partial").write_bytes(b"torn")
    (folder / "tenancy.json.0a1b2c3d.partial").write_bytes(b"torn")
    state_path(folder, 0, 4, "export").write_bytes(b"torn")
    state_path(folder, 0, 3, "snapshot").rename(state_path(folder, 0, 3, "fetched"))
    async with lone_node(blobs) as n:
        stream = await ask(n, SUBMITTER, inquire(3, 2, job), job)
        assert [each[:6] for each in (await answered(stream)).held] == [(0, 0, 4, 3, 0, 4)]
        assert not state_path(folder, 0, 4, "export").exists()
        assert not list(folder.rglob("*.partial"))
        third = Coordinator(stream, job, 3, second.commits)
        await third.tell(Save(job.job, Generation(3), 3, 0))
        assert (await third.receive(Saved)).step == 3, "what was fetched is given on"
        assert n.service.hosts()[0].child_pid is None
        await third.assign(SUBMITTER, 4, StateSource("keep"))
        await third.commit(await third.prepare(4))
        hashes = {**first.hashes, **second.hashes, **third.hashes}
        assert hashes == {step: undisturbed[step] for step in range(5)}
        await third.tell(Release(job.job, "done"))
        await n.logs("job left")


@pytest.mark.processes
async def test_a_child_that_was_killed_is_replaced_from_the_disk(
    blobs: Path, job: Manifest, undisturbed: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = blobs / "hit"
    monkeypatch.setenv("SWARMNODE_FAILPOINT", "after_commit:1")
    monkeypatch.setenv("SWARMNODE_FAILPOINT_ONCE", str(marker))
    async with lone_node(blobs) as n:
        first = await first_coordinator(n, job)
        await first.assign(SUBMITTER, 0, StateSource("init"))
        await first.commit(await first.prepare(0))
        ready = await first.prepare(1)
        first.commits.append(Committed(1, 1.0, (ready.update,)))
        await first.tell(Commit(job.job, Generation(1), 1, 1.0))
        while not isinstance(failed := await answer(first.stream), Failed):
            pass
        assert "SIGKILL" in failed.reason
        assert marker.exists()
        await first.tell(inquire(2, 1, job))
        found = await first.receive(Answer)
        assert [each[:6] for each in found.held] == [(0, 0, 4, 0, 0, 2)]
        first.generation = 2
        await first.assign(SUBMITTER, 2, StateSource("keep"))
        await first.commit(await first.prepare(2))
        assert first.hashes[2] == undisturbed[2]
        await first.tell(Release(job.job, "done"))
        await n.logs("job left")
