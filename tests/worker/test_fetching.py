"""States and updates from other workers, by content; and what a keeper keeps of them."""

import asyncio
import gc
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from swarmnode.domain import BlobRef, Generation, JobId, PeerId, Plan, SlotId
from swarmnode.errors import ChunkError, DataError, ProtocolError, RefusedError
from swarmnode.home import KEPT_S
from swarmnode.manifest import Manifest
from swarmnode.messages import (
    Assign,
    Ready,
    StateSource,
)
from swarmnode.p2p.blob_server import serve_blobs
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.blobs import BlobClient
from swarmnode.p2p.memory import MemoryNetwork
from swarmnode.p2p.states import TensorIndex
from swarmnode.tensorfiles import read_header
from swarmnode.updates import index_update
from swarmnode.worker import fetching
from swarmnode.worker.assigning import gather
from swarmnode.worker.fetching import Fetcher
from swarmnode.worker.files import state_path
from swarmnode.worker.handoff import Handoff, Update
from swarmnode.worker.models import save_tensors
from swarmnode.worker.service import old_folders
from swarmnode.worker.state_keeper import StateKeeper
from swarmnode.worker.training.log import UpdateLog

JOB = JobId("job")
ME, HOLDER, EMPTY, COORDINATOR = (PeerId(name) for name in ("me", "holder", "empty", "head"))
PLAN = Plan(
    Generation(1), ((0, 2), (2, 4)), ((ME, HOLDER), (ME, HOLDER)), COORDINATOR,
    shadows=((EMPTY,), ()),
)  # fmt: skip
BIG = os.urandom(3 << 20)


class World:
    """One who fetches, and three who serve: one has something, two have nothing."""

    def __init__(self, folder: Path, network: MemoryNetwork) -> None:
        self.folder = folder
        self.refusals = 0
        self.stores: dict[PeerId, BlobStore] = {}
        for peer in (ME, HOLDER, EMPTY, COORDINATOR):
            self.stores[peer] = BlobStore(folder / peer / "blobs")
            serve_blobs(network.transport(peer), self.stores[peer], self._allowed)
        self.store = self.stores[ME]
        blobs = BlobClient(network.transport(ME), self.store)
        self.fetcher = Fetcher(JOB, PLAN, ME, self.store, blobs)
        self.keeper = self.make_keeper(HOLDER)

    def make_keeper(self, peer: PeerId) -> StateKeeper:
        return StateKeeper(self.folder / peer / "job", self.stores[peer], starts_itself=True)

    def _allowed(self, _peer: PeerId, _job: JobId) -> bool:
        self.refusals -= 1
        return self.refusals < 0

    def say(self, step: int, data: bytes, stage: int = 1) -> BlobRef:
        """The holder logs an update and says so."""
        ref = self.keeper.log(stage).write(step, [data])
        slot = SlotId(stage, 1)
        self.keeper.said(Ready(JOB, Generation(1), step, slot, (), ref, (), ()))
        return ref


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[World]:
    async with asyncio.timeout(30), MemoryNetwork() as network:
        yield World(folder, network)


async def test_updates_come_from_whoever_has_them_into_the_own_log(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        refs = {step: w.say(step, BIG[step:]) for step in (4, 5)}
        log = UpdateLog(tmp_path / "me" / "stage-1")
        wanted = [Update(step, 1.0, ref, False) for step, ref in refs.items()]
        await w.fetcher.updates(wanted, [EMPTY], log)  # not from those who were named first
        assert log.inventory() == refs
        assert log.update_path(5).read_bytes() == BIG[5:]
        left = [p for p in (tmp_path / "me" / "blobs").rglob("*") if p.is_file()]
        assert left == [], "what is in the log now is not kept twice"


async def test_an_update_of_another_step_is_refused(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        ref = w.say(4, b"x")
        log = UpdateLog(tmp_path / "me" / "stage-1")
        with pytest.raises(ProtocolError, match="says step 4"):
            await w.fetcher.updates([Update(5, 1.0, ref, False)], [HOLDER], log)
        missing = index_update(7, [b"nobody has this"]).ref
        with pytest.raises(ChunkError):
            await w.fetcher.updates([Update(7, 1.0, missing, False)], [HOLDER], log)
        assert log.inventory() == {}


async def test_who_does_not_know_the_plan_yet_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as w:
        ref = w.say(4, b"x")
        log = UpdateLog(tmp_path / "me" / "stage-1")
        monkeypatch.setattr(fetching, "RETRY_S", (0.0,))
        w.refusals = 4  # each of the three, and the holder that was asked first
        await w.fetcher.updates([Update(4, 1.0, ref, False)], [HOLDER], log)
        assert log.inventory() == {4: ref}
        w.refusals = 1000
        other = w.say(5, b"y")
        with pytest.raises(RefusedError):
            await w.fetcher.updates([Update(5, 1.0, other, False)], [HOLDER], log)


async def test_a_published_state_is_fetched_without_what_other_stages_need(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        tensors = {f"model.layers.{n}.w": torch.full((5,), float(n)) for n in range(4)}
        source = state_path(w.keeper.directory, 0, 6, "snapshot")
        source.parent.mkdir(parents=True)
        save_tensors(source, tensors)
        ref = w.keeper.publish(source, 6)
        path = state_path(tmp_path / "me" / "job", 1, 6, "fetched")
        await w.fetcher.state(ref, [HOLDER], 1, path)
        assert sorted(read_header(path)) == ["model.layers.2.w", "model.layers.3.w"]
        keeper = w.make_keeper(ME)
        keeper.load()
        assert keeper.holding(1).snapshots == (6,)
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        keeper.load()
        assert keeper.holding(1).snapshots == (), "what was damaged since goes at the next start"


async def test_a_checkpoint_that_is_stored_while_the_same_is_fetched_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as w:
        source = state_path(w.keeper.directory, 0, 6, "snapshot")
        source.parent.mkdir(parents=True)
        save_tensors(source, {"model.layers.2.w": torch.ones(5)})
        ref = w.keeper.publish(source, 6)
        chunks = TensorIndex.from_json(w.stores[HOLDER].read(ref)).chunks()
        stored: list[BlobRef] = []

        def is_ours_too(_done: int, total: int) -> None:
            if total and all(map(w.store.has, chunks)) and not stored:
                w.store.own((ref, *chunks))
                stored.extend((ref, *chunks))

        monkeypatch.setattr(fetching, "_hit_half_way", is_ours_too)
        for step in (6, 7):
            path = state_path(tmp_path / "me" / "job", 1, step, "fetched")
            await w.fetcher.state(ref, [HOLDER], 1, path)
            assert stored
            assert all(map(w.store.has, stored))


async def test_a_state_that_was_fetched_stays_although_the_own_log_disproves_what_lies_there(
    tmp_path: Path,
) -> None:
    """Of another history are the own state 6 and update 4; state 6 of the right one is fetched."""
    async with world(tmp_path) as w:
        tensors = {"model.layers.2.w": torch.ones(5), "model.layers.3.w": torch.ones(5)}
        source = state_path(w.keeper.directory, 1, 6, "snapshot")
        source.parent.mkdir(parents=True)
        save_tensors(source, tensors)
        index, right = w.keeper.publish(source, 6), w.say(6, b"right")
        keeper = w.make_keeper(ME)
        old = state_path(keeper.directory, 1, 6, "snapshot")
        old.parent.mkdir(parents=True)
        save_tensors(old, {name: -values for name, values in tensors.items()})
        update = Update(6, 1.0, right, False)
        taken = Handoff("fetch", 6, (update,), (6,), (4,), disproved_after=4)
        wanted = {1: (taken, StateSource("fetch", 6, index, (HOLDER,)))}
        assign = Assign(JOB, PLAN, 7, (), b"")
        job = Manifest.model_construct(data=None)
        (base,) = await gather(assign, job, wanted, keeper, w.fetcher, ME)
        assert (base.how, base.step) == ("load", 6)
        assert read_header(Path(base.path)).keys() == tensors.keys()
        assert load_file(base.path)["model.layers.2.w"].tolist() == [1.0] * 5
        assert not old.exists()


# ---- who is cancelled ---------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["write_safetensors", "_log"])
async def test_who_is_cancelled_ends_when_nothing_is_written_any_more(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as w:
        has_begun, may_go_on, reads = threading.Event(), threading.Event(), list[BlobRef]()
        real, noise = getattr(fetching, what), list[Any]()
        asyncio.get_running_loop().set_exception_handler(lambda _, said: noise.append(said))

        def write(*args: Any, **options: Any) -> None:
            has_begun.set()
            may_go_on.wait()
            real(*args, **options)

        source = state_path(w.keeper.directory, 0, 6, "snapshot")
        source.parent.mkdir(parents=True)
        save_tensors(source, {"model.layers.2.w": torch.ones(5)})
        path = state_path(tmp_path / "me" / "job", 1, 6, "fetched")
        log, update = UpdateLog(path.parent), Update(4, 1.0, w.say(4, BIG), False)

        async def fetch() -> None:
            if what == "_log":
                await w.fetcher.updates([update], [HOLDER], log)
            else:
                await w.fetcher.state(w.keeper.publish(source, 6), [HOLDER], 1, path)

        monkeypatch.setattr(fetching, what, write)
        task = asyncio.ensure_future(fetch())
        await asyncio.to_thread(has_begun.wait)
        monkeypatch.setattr(w.store, "read", reads.append)
        for _ in range(2):  # whoever is in a hurry cancels twice
            task.cancel()
            await asyncio.wait([task], timeout=0.01)
        was_done = task.done()
        may_go_on.set()
        await asyncio.wait([task])
        assert not was_done, "the thread might still write"
        assert task.cancelled()
        assert reads == [], "it stops before its next chunk"
        assert not [p for p in path.parent.rglob("*") if p.is_file()]
        monkeypatch.undo()
        await fetch()
        assert log.inventory() == ({4: update.ref} if what == "_log" else {})
        assert path.exists() == (what != "_log")
        del task
        gc.collect(1)
        assert noise == []


# ---- what is kept ------------------------------------------------------------------------------


def snapshot(keeper: StateKeeper, step: int, kind: str = "snapshot", stage: int = 1) -> Path:
    path = state_path(keeper.directory, stage, step, kind)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, {"x": torch.zeros(3)})
    return path


async def test_tidying_keeps_two_snapshots_and_the_log_since_the_older(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        refs = {step: w.say(step, b"%d" % step) for step in range(3, 12)}
        files = {step: snapshot(w.keeper, step) for step in (3, 6)}
        w.keeper.begun()
        w.keeper.tidy(PLAN, HOLDER)
        assert sorted(w.keeper.holding(1).log) == list(range(3, 12))
        files[9] = snapshot(w.keeper, 9)
        exports = [snapshot(w.keeper, step, "export") for step in (7, 8, 10)]
        foreign = snapshot(w.keeper, 9, stage=7)
        w.keeper.tidy(PLAN, HOLDER)
        assert [path.exists() for path in files.values()] == [False, True, True]
        assert [path.exists() for path in exports] == [False, True, True]
        assert not foreign.parent.exists(), "a stage that is held no more"
        assert w.keeper.holding(1).log == {step: refs[step] for step in range(6, 12)}
        with pytest.raises(ChunkError):
            w.stores[HOLDER].read(refs[5])
        assert w.stores[HOLDER].read(refs[6])


async def test_nothing_goes_while_another_generation_is_in_the_making(tmp_path: Path) -> None:
    """Whoever answered with an older log would not have it any more when it is asked for."""
    async with world(tmp_path) as w:
        for step in range(3, 12):
            w.say(step, b"x")
        w.keeper.begun()
        for step in (6, 9):
            snapshot(w.keeper, step)
        w.keeper.unsettle()
        w.keeper.tidy(PLAN, HOLDER)
        assert sorted(w.keeper.holding(1).log) == list(range(3, 12))
        w.keeper.begun()
        w.keeper.tidy(PLAN, HOLDER)
        assert sorted(w.keeper.holding(1).log) == list(range(6, 12))


async def test_updates_stay_for_who_fetches_a_state_as_long_as_they_are_few(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        num_bytes = snapshot(w.keeper, 2).stat().st_size
        for step in range(2, 6):
            w.say(step, bytes(num_bytes))
        w.keeper.begun()
        w.keeper.reserve(1, 2)
        for step in (4, 6):
            snapshot(w.keeper, step)
        w.keeper.tidy(PLAN, HOLDER)
        assert sorted(w.keeper.holding(1).log) == [2, 3, 4, 5]
        for step in range(6, 10):
            w.say(step, bytes(num_bytes))
        snapshot(w.keeper, 8)
        w.keeper.tidy(PLAN, HOLDER)
        assert sorted(w.keeper.holding(1).log) == list(range(2, 10)), "four times the state"
        snapshot(w.keeper, 9)
        w.keeper.tidy(PLAN, HOLDER)
        assert sorted(w.keeper.holding(1).log) == [8, 9]
        w.keeper.reserve(1, 8)
        w.keeper.unsettle()
        w.keeper.begun()
        snapshot(w.keeper, 10)
        w.keeper.tidy(PLAN, HOLDER)
        assert sorted(w.keeper.holding(1).log) == [9], "that plan has begun"


async def test_what_was_published_goes_with_its_file_and_no_sooner(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        store = w.stores[HOLDER]
        export, same = snapshot(w.keeper, 5, "export"), snapshot(w.keeper, 5)
        refs = {ref for path in (export, same) for ref in [w.keeper.publish(path, 5)]}
        assert len(refs) == 1, "the same content"
        (index,) = refs
        for step in (6, 7):
            snapshot(w.keeper, step, "export")
        w.keeper.begun()
        w.keeper.tidy(PLAN, HOLDER)
        assert (export.exists(), same.exists()) == (False, True)
        chunks = TensorIndex.from_json(store.read(index)).chunks()
        assert all(map(store.has, chunks)), "the snapshot has it still"
        for step in (6, 7):
            snapshot(w.keeper, step)
        w.keeper.tidy(PLAN, HOLDER)
        assert not any(map(store.has, (index, *chunks)))
        left = {path.name for path in w.keeper.directory.rglob("*") if path.is_file()}
        assert left == {f"{s}{kind}.safetensors" for s in (6, 7) for kind in ("", ".export")}
        assert not [path for path in store.root.rglob("*") if path.is_file()]


async def test_a_generation_forgets_what_was_prepared_and_never_committed(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        for step in (4, 5):
            w.say(step, b"x")
        w.keeper.memory = {1: 5}
        assert [ready.step for ready in w.keeper.readies()] == [5]
        w.keeper.memory = {1: 6}
        assert [ready.step for ready in w.keeper.readies()] == [5], "who asks may not know that"
        w.keeper.memory = {1: 5}
        w.keeper.took({1: Handoff("keep", 5, (), (), (5,))}, 5)
        assert w.keeper.readies() == ()
        assert list(w.keeper.holding(1).log) == [4]
        assert w.keeper.memory == {1: 5}


async def test_other_layers_are_another_stage(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        for stage in (0, 1):
            w.say(4, b"x", stage)
        new = Plan(Generation(2), ((0, 2), (2, 5)), PLAN.slots, COORDINATOR)
        w.keeper.change_layers(PLAN, new)
        assert list(w.keeper.holding(0).log) == [4]
        assert list(w.keeper.holding(1).log) == []


async def test_a_ready_that_the_log_does_not_bear_out_is_refused(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.keeper.log(1).write(4, [b"x"])
        wrong = Ready(JOB, Generation(1), 4, SlotId(1, 1), (), BlobRef("0" * 64, 1), (), ())
        with pytest.raises(DataError):
            w.keeper.said(wrong)


def test_folders_that_nobody_touched_for_a_week_are_old(tmp_path: Path) -> None:
    old, young = tmp_path / "old", tmp_path / "young"
    for folder in (old, young):
        (folder / "stage-0").mkdir(parents=True)
        (folder / "stage-0" / "3.update").touch()
    now_s = 1e9
    for path in (old, *old.rglob("*"), young, young / "stage-0"):
        os.utime(path, (0, now_s - KEPT_S - 1))
    os.utime(young / "stage-0" / "3.update", (0, now_s - KEPT_S + 1))
    assert old_folders(tmp_path, now_s) == [old]
    assert old_folders(tmp_path / "nowhere", now_s) == []
