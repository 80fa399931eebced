"""A disk that is slower than training costs snapshots; no memory, no step and no log."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_swarm import LLAMA, Swarm, make_manifest

from swarmnode.domain import Generation, PeerId
from swarmnode.engine_messages import Base, Export, Exported, Replay
from swarmnode.messages import Failed
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.worker.engine import snapshots
from swarmnode.worker.files import stage_directory, state_path
from swarmnode.worker.models import save_tensors
from swarmnode.worker.state_keeper import StateKeeper

A = PeerId("a")


class SlowDisk:
    """One node with both stages, on whose disk nothing gets before `goes_on`."""

    def __init__(self, folder: Path) -> None:
        self.swarm = Swarm(make_manifest(folder, LLAMA), [["a", "a"], ["a", "a"]], folder)
        self.swarm.configure()
        self.snapshots = self.swarm.engines[A]._snapshots
        self.scales: list[float] = []
        self.stands_still()

    def stands_still(self) -> None:
        self._may_write = threading.Event()
        self.snapshots._writer.submit(self._may_write.wait)

    def step(self, *, snapshot: bool = False) -> None:
        number = len(self.scales)
        self.swarm.begin(number)
        self.swarm.pump()
        self.scales.append(self.swarm.commit(number, snapshot=snapshot).scale)

    def export(self, stage: int) -> Path:
        """Ask for the state of a stage as it is now."""
        step = len(self.scales)
        path = state_path(self.swarm.home / "a", stage, step, "export")
        job = self.swarm.manifest.job
        self.swarm.tell(A, Export(job, Generation(1), step, stage, str(path)))
        return path

    def goes_on(self) -> None:
        """Whatever was begun is on the disk when this returns."""
        self._may_write.set()
        self.snapshots._copier.submit(int).result()
        self.snapshots._writer.submit(int).result()
        self.swarm.pump()

    def written(self) -> dict[int, list[int]]:
        """The steps of each stage of which there is a file since the last look."""
        found = self.swarm.take(Exported)
        assert all(Path(each.path).exists() for each in found)
        return {s: sorted({e.step for e in found if e.stage == s}) for s in (0, 1)}


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[SlowDisk]:
    found = SlowDisk(tmp_path)
    try:
        yield found
    finally:
        found.goes_on()
        found.swarm.engines[A].close()


def test_no_snapshot_is_taken_before_the_last_one_is_written(slow: SlowDisk) -> None:
    for _ in range(4):
        slow.step(snapshot=True)
    slow.goes_on()
    assert slow.written() == {0: [1], 1: [1]}
    slow.step()
    slow.step(snapshot=True)
    slow.goes_on()
    assert slow.written() == {0: [6], 1: [6]}, "the next one that is due"
    assert slow.swarm.take(Failed) == []


def test_the_log_stays_back_to_the_last_snapshot_that_was_written(
    slow: SlowDisk, tmp_path: Path
) -> None:
    home = slow.swarm.home / "a"
    slow.step(snapshot=True)
    slow.goes_on()
    slow.stands_still()
    for _ in range(4):
        slow.step(snapshot=True)
    keeper = StateKeeper(home, BlobStore(tmp_path / "store"), starts_itself=False)
    keeper.load()
    keeper.begun()
    keeper.tidy(slow.swarm.plan, A)
    hashes = slow.swarm.step_hashes()
    fresh = Swarm(slow.swarm.manifest, slow.swarm.slots, tmp_path, generation=5)
    fresh.home = slow.swarm.home

    def base(_: PeerId, stage: int) -> Base:
        log, scales = keeper.log(stage), list(enumerate(slow.scales))
        updates = tuple(Replay(k, scale, str(log.update_path(k))) for k, scale in scales[1:])
        return Base(stage, "load", 1, str(keeper.file(stage, 1)), updates)

    fresh.start(5, base)
    slow.goes_on()
    assert fresh.step_hashes() == hashes
    fresh.engines[A].close()


def test_who_waits_for_a_state_gets_it_after_the_write_at_hand(slow: SlowDisk) -> None:
    slow.step(snapshot=True)
    slow.step(snapshot=True)
    path = slow.export(0)
    again = slow.export(0)
    slow.step(snapshot=True)  # neither the write at hand nor the one that waits is waited for
    assert path == again
    assert not path.exists()
    slow.goes_on()
    assert slow.written() == {0: [1, 2], 1: [1]}
    assert path.exists()
    assert slow.swarm.dropped() == {}


def test_of_those_who_wait_the_newest_counts_and_nothing_piles_up(slow: SlowDisk) -> None:
    slow.step(snapshot=True)
    paths = []
    for _ in range(4):
        slow.step()
        paths.append(slow.export(0))
        slow.snapshots._copier.submit(int).result()
        held = [write for write in slow.snapshots._writes[0] if write.tensors]
        assert [write.step for write in held] == [1, len(slow.scales)]
    slow.goes_on()
    assert slow.written() == {0: [1, 5], 1: [1]}
    assert [path.exists() for path in paths] == [False, False, False, True]
    assert slow.swarm.dropped() == {"export": 3}
    assert slow.swarm.take(Failed) == [], "training goes on all the same"
    assert not any(write.tensors for write in slow.snapshots._writes[0])
    assert not list(stage_directory(slow.swarm.home / "a", 0).glob("*.partial"))


@pytest.mark.parametrize("is_written", [False, True])
def test_a_state_of_a_history_that_was_given_up_is_not_taken_for_the_one_computed_again(
    slow: SlowDisk, monkeypatch: pytest.MonkeyPatch, is_written: bool
) -> None:
    """One is being written, another waits, or both are, when the job goes back: files of the same
    names."""
    began, may_end = threading.Event(), threading.Event()

    def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        began.set()
        assert may_end.wait(60)
        save_tensors(path, tensors)

    monkeypatch.setattr(snapshots, "save_tensors", save)
    slow.goes_on()
    slow.step(snapshot=True)
    assert began.wait(60)
    if is_written:  # whoever looked for what is stale has looked before
        may_end.set()
        slow.goes_on()
        assert slow.written() == {0: [1], 1: [1]}
    slow.swarm.configure()
    slow.scales.clear()
    slow.step()
    path = slow.export(0)
    may_end.set()
    slow.goes_on()
    files = [Path(said.path) for said in slow.swarm.take(Exported) if said.path]
    assert files == [path], "only what was asked for since"
    found = stage_directory(slow.swarm.home / "a", 0).parent.rglob("1.*")
    assert list(found) == [path]
