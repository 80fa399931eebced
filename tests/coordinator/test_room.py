"""A job whose coordinator's disk is full: it waits, says why, and goes on by itself."""

import asyncio
import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from swarmnode.coordinator import events as on
from swarmnode.coordinator import room, runner
from swarmnode.coordinator.job_files import JobFiles
from swarmnode.coordinator.journal import read_journal
from swarmnode.coordinator.runner import RunnerTools
from swarmnode.coordinator.service import CoordinatorService
from swarmnode.coordinator.solving import Solver
from swarmnode.domain import Advert, JobId, ModelFacts, PeerId
from swarmnode.errors import SwarmError
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.blobs import BlobClient
from swarmnode.p2p.identity import Identity
from swarmnode.p2p.memory import MemoryNetwork
from swarmnode.p2p.switch import Switch
from swarmnode.tokenizer import write_byte_tokenizer
from tests.coordinator.bench import BLOB, FACTS, advert, manifest
from tests.tmpfs import fill, tmpfs

WHY = "because " * 1000
"""Longer than what is left of the journal's last page, which a full tmpfs still takes."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 4 MiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with tmpfs(folder, "4m"):
        yield folder


@dataclass
class Life:
    """One life of a coordinator that has a job on its disk and nobody to work for it."""

    disk: Path
    elsewhere: Path
    said: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    identity: Identity = field(default_factory=lambda: Identity(bytes(32)))
    peers: tuple[Advert, ...] = ()

    def prepare(self) -> JobId:
        """What an earlier life has left."""
        folder = self.elsewhere / "tokenizer"
        folder.mkdir()
        write_byte_tokenizer(folder)
        texts = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
        tokenizer = self.store.put(json.dumps(texts, sort_keys=True).encode())
        job = manifest().model_copy(
            update={"tokenizer": tokenizer, "submitter": self.identity.peer}
        )
        saved = {
            "manifest": json.loads(job.canonical()),
            "signature": self.identity.sign(job.canonical()).hex(),
            "facts": asdict(FACTS),
            "weights_path": None,
        }
        (self.disk / job.job).mkdir()
        (self.disk / job.job / "job.json").write_text(json.dumps(saved))
        return job.job

    @property
    def store(self) -> BlobStore:
        return BlobStore(self.elsewhere / "blobs")

    @contextlib.asynccontextmanager
    async def running(self) -> Any:
        def log(event: str, **facts: Any) -> None:
            self.said.append((event, facts))

        async def facts_of(*_: Any) -> ModelFacts:
            return FACTS

        async def live(ready: asyncio.Future[CoordinatorService], tools: RunnerTools) -> None:
            async with asyncio.TaskGroup() as group:
                service = CoordinatorService(self.identity, self.disk, tools, group, facts_of)
                await service.restore()
                ready.set_result(service)
                await asyncio.Event().wait()

        async with MemoryNetwork() as network, asyncio.TaskGroup() as group:
            transport, store = network.transport(self.identity.peer), self.store
            tools = RunnerTools(
                transport=transport,
                store=store,
                blobs=BlobClient(transport, store),
                switch=Switch(transport, group, lambda _: None, lambda *_: None),
                peers=lambda: self.peers,
                on_sent=lambda *_: None,
                on_changed=lambda _: None,
                log=log,
                solver=Solver(self.elsewhere / "solver.log"),
                links=lambda: (),
            )

            ready = asyncio.get_running_loop().create_future()
            task = group.create_task(live(ready, tools))
            try:
                yield await ready
            finally:
                task.cancel()

    def events(self, *names: str) -> list[str]:
        return [event for event, _ in self.said if event in names]


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - threads and disks have no event
            await asyncio.sleep(0.01)


async def test_a_job_waits_while_its_disk_is_full_and_then_goes_on(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "ROOM_S", 0.02)
    looks = count_looks(monkeypatch)
    life = Life(disk, tmp_path)
    name = life.prepare()
    async with life.running() as service:
        job = service.find(name)
        ballast = fill(disk)
        await job.runner.tell(on.StopAsked(WHY))
        seen = 0
        while "room" not in job.ledger.reason:  # whoever watches the job is told
            async with asyncio.timeout(20):
                seen = await job.runner.changed(seen)
        assert job.ledger.phase == "waiting"
        assert "No space left on device" in job.ledger.reason
        await until(lambda: len(looks) >= 5)
        assert life.events("job waits for room", "job gave up", "job goes on") == [
            "job waits for room"
        ], "once, however often it looks"
        ballast.unlink()
        await until(lambda: job.ledger.phase == "stopped")
        await job.runner.settled()
        records, _ = read_journal(disk / name / "journal")
        assert records[-1] == on.EndRecord("stopped", WHY)
        assert life.events("job gave up", "job goes on") == ["job goes on"]
        assert not (disk / name / "room").exists()


async def test_a_job_that_cannot_be_restored_for_want_of_room_is_restored_later(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "ROOM_S", 0.02)
    looks = count_looks(monkeypatch)
    life = Life(disk, tmp_path)
    name = life.prepare()
    ballast = fill(disk)
    async with life.running() as service:
        await until(lambda: len(looks) >= 3)
        assert service.jobs == ()
        ballast.unlink()
        await until(lambda: bool(service.jobs))
        assert service.find(name).ledger.phase == "waiting"
        assert life.events("job waits for room") == ["job waits for room"]


async def test_what_is_no_want_of_room_ends_the_job_until_the_node_is_started_again(
    disk: Path, tmp_path: Path
) -> None:
    life = Life(disk, tmp_path)
    name = life.prepare()
    async with life.running() as service:
        job = service.find(name)
        job.runner._journal.close()
        await job.runner.tell(on.StopAsked("now"))
        seen = 0
        while job.ledger.phase != "failed":
            async with asyncio.timeout(20):
                seen = await job.runner.changed(seen)
        assert "restart the node" in job.ledger.reason
        assert life.events("job gave up", "job waits for room") == ["job gave up"]


async def test_of_a_job_that_finds_no_room_nothing_stays_that_could_start_later(
    disk: Path, tmp_path: Path
) -> None:
    """However far its files come."""
    write_byte_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("Nothing of it stays. " * 100)
    raw = {
        "name": "job",
        "model": {"config": {"model_type": "llama", "vocab_size": FACTS.vocab_size}},
        "tokenizer": str(tmp_path / "tokenizer"),
        "data": {"path": "text.txt"},
        "batch": {"sequence_length": 16},
        "placement": {"stages": 2, "slots": 1},
    }
    life = Life(disk, tmp_path, peers=(advert("a"), advert("b")))
    ballast, num_refused, job = fill(disk), 0, None
    async with life.running() as service:
        while job is None:
            try:
                job = await service.submit(raw, tmp_path)
            except SwarmError as error:
                said = str(error)
                num_refused += 1
            assert job or said.startswith(f"job not started: {disk}")
            assert job or (set(disk.iterdir()), service.jobs) == ({ballast}, ())
            os.truncate(ballast, ballast.stat().st_size - (1 << 12))
        assert num_refused >= 3
        assert [running.manifest.job for running in service.jobs] == [job]


async def test_a_job_that_is_over_waits_for_no_state_that_does_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()

    async def keep_state(*_: Any) -> None:
        asked.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(runner, "keep_state", keep_state)
    (tmp_path / "disk").mkdir()
    life = Life(tmp_path / "disk", tmp_path)
    name = life.prepare()
    async with life.running() as service:
        job = service.find(name)
        await job.runner._perform(on.StoreState(0, 1, BLOB, PeerId("b")))
        await asked.wait()
        await job.runner.tell(on.StopAsked("now"))
        await until(lambda: job.runner._journal._file.closed)
        assert job.ledger.phase == "stopped"


def count_looks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every attempt to find room, as it happens."""
    looks: list[Path] = []
    look = room._claim

    def counted(directory: Path) -> None:
        looks.append(directory)
        look(directory)

    monkeypatch.setattr(room, "_claim", counted)
    return looks


def test_a_full_disk_is_found_in_groups_and_behind_other_errors() -> None:
    full, broken = OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken")
    wrapped = SwarmError("cannot store")
    wrapped.__cause__ = full
    assert room.full_disk(ExceptionGroup("", [SwarmError("x"), ExceptionGroup("", [full])])) is full
    assert room.full_disk(wrapped) is full
    assert room.full_disk(OSError(errno.EDQUOT, "quota")) is not None
    assert room.full_disk(ExceptionGroup("", [broken, SwarmError("x")])) is None


async def test_a_new_job_is_on_the_disk_with_the_name_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, synced, fsync = tmp_path / "jobs", list[str](), os.fsync
    disk.mkdir()

    def noted(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    async with Life(disk, tmp_path).running() as service:
        files = JobFiles(disk / "job", manifest(), b"", FACTS)
        monkeypatch.setattr(os, "fsync", noted)
        with pytest.raises(SwarmError):  # its tokenizer is not in the store
            service._laid_down(files)
    assert synced[0] == str(disk)
    assert str(files.directory) in synced[1:]
    assert not files.directory.exists()


def test_looking_for_room_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "room.0a1b2c3d.partial").write_bytes(b"of a life that a crash ended")
    room._claim(tmp_path)
    assert list(tmp_path.iterdir()) == []
