"""What is damaged of one job, or of what a node remembers, keeps no daemon from starting."""

import errno
import json
import os
import time
from pathlib import Path

import pytest
from worker_node import GOOD, SUBMITTER, Node, manifest, node, plan

from swarmnode.domain import DeviceSpec, Generation, JobId
from swarmnode.errors import DataError
from swarmnode.home import KEPT_S
from swarmnode.manifest import Manifest
from swarmnode.network import LastLife, load_last_life, save_last_life
from swarmnode.papers import Papers
from swarmnode.worker import probe
from swarmnode.worker.service import old_folders
from swarmnode.worker.state_keeper import TENANCY_NAME, load_tenancy, save_tenancy
from swarmnode.worker.tenancy import Tenancy

BAD = manifest(name="bad")


def keep(jobs: Path, job: Manifest) -> Path:
    """What an earlier life has adopted of a job; the file."""
    tenancy = Tenancy(job.job, SUBMITTER.peer, Generation(1), SUBMITTER.peer, plan())
    save_tenancy(jobs / job.job, tenancy, job.canonical(), SUBMITTER.sign(job.canonical()))
    return jobs / job.job / TENANCY_NAME


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b'"promised"')] ^= 1
    path.write_bytes(data)


def flip_a_bit_of_the_manifest(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b'{\\"', b"{\\#", 1))


def spoil_the_text(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"promised", b"\xf0romised", 1))


def name_what_a_later_version_rejects(path: Path) -> None:
    raw = json.loads(path.read_text())
    raw["manifest"] = json.dumps({**json.loads(raw["manifest"]), "of_an_old_version": 1})
    del raw["sha256"]
    path.write_text(json.dumps(raw))


def test_no_flipped_bit_makes_another_promise(tmp_path: Path) -> None:
    path = keep(tmp_path, GOOD)
    data, whole = path.read_bytes(), load_tenancy(path.parent)
    num_noticed = 0
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        try:
            assert load_tenancy(path.parent) == whole
        except DataError:
            num_noticed += 1
    assert num_noticed > 0.9 * len(data), "else it is the name of the hash, or white space"
    raw = json.loads(data)
    del raw["sha256"]  # as older versions wrote it
    path.write_text(json.dumps(raw))
    assert load_tenancy(path.parent) == whole


@pytest.mark.parametrize(
    "damage",
    [flip_a_bit, flip_a_bit_of_the_manifest, spoil_the_text, name_what_a_later_version_rejects],
)
async def test_one_unreadable_promise_is_said_once_and_the_other_jobs_are_restored(
    tmp_path: Path, damage: object
) -> None:
    jobs = tmp_path / "jobs"
    for job in (GOOD, BAD):
        keep(jobs, job)
    assert callable(damage)
    damage(jobs / BAD.job / TENANCY_NAME)
    found: dict[JobId, Papers | None] = {}
    nodes: list[Node] = []

    def orphaned(job: JobId) -> None:
        found[job] = nodes[0].service.papers(job)

    async with node(tmp_path, on_orphaned=orphaned) as n:
        nodes.append(n)
        for _ in range(2):
            await n.service.restore()
        assert {job: papers and papers.plan for job, papers in found.items()} == {
            GOOD.job: plan(),
            BAD.job: None,
        }
        ((event, fields),) = n.logged
        assert (event, fields["job"]) == ("papers not readable", BAD.job)


def test_a_folder_that_cannot_be_looked_at_is_not_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("broken", "old"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1.0, 1.0))
    stat = Path.stat

    def failing(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if path.name == "broken":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return stat(path, follow_symlinks=follow_symlinks)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", failing)
        found = old_folders(tmp_path, time.time() + KEPT_S)
    assert [path.name for path in found] == ["old"]


def test_a_port_that_cannot_be_is_not_taken_for_the_last_one(tmp_path: Path) -> None:
    save_last_life(tmp_path, LastLife(34567, 45678, ("/ip4/127.0.0.1/tcp/1/p2p/x",)))
    path = tmp_path / "network.json"
    path.write_text(path.read_text().replace("34567", "74567"))
    assert load_last_life(tmp_path) == LastLife(0, 45678, ("/ip4/127.0.0.1/tcp/1/p2p/x",))
    path.write_text(path.read_text().replace("45678", "-5678"))
    assert load_last_life(tmp_path) == LastLife(0, 0, ("/ip4/127.0.0.1/tcp/1/p2p/x",))


def test_a_kind_of_device_that_cannot_be_was_not_measured(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    spec = DeviceSpec("cuda", "x", {"float32": 1e9, "bfloat16": 1e9}, 1e9, 10, 5, 2)
    probe._write(path, "k", spec)
    assert probe._read(path, "k") == spec
    path.write_text(path.read_text().replace('"cuda"', '"cudc"'))
    assert probe._read(path, "k") is None
