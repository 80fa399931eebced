"""Who is let go while the disk is full is let go all the same, and says so as soon as it can."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from worker_node import GOOD, STRANGER, SUBMITTER, Node, answer, assign, node, plan

from swarmnode.domain import Generation
from swarmnode.messages import Answer, Failed, Inquire, Release
from swarmnode.p2p.ports import Stream
from swarmnode.wire import pack
from swarmnode.worker import fetching, service
from swarmnode.worker.files import stage_directory
from swarmnode.worker.state_keeper import TENANCY_NAME
from tests.tmpfs import fill, tmpfs


@pytest.fixture(autouse=True)
def _without_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "RETRY_S", ())
    monkeypatch.setattr(service, "SAVE_AGAIN_S", 0.02)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Where the node has its jobs: a file system with room for 256 KiB."""
    folder = tmp_path / "jobs"
    folder.mkdir()
    with tmpfs(folder, "256k"):
        yield folder


async def held(n: Node) -> Stream:
    """A job that the node has taken; nothing is written any more."""
    stream = await n.stream()
    await stream.send(pack(assign()), GOOD.canonical())
    assert isinstance(await answer(stream), Failed), "nobody has the data"
    return stream


async def asked(n: Node, generation: int, sender: Any = SUBMITTER) -> Answer:
    inquire = Inquire(
        GOOD.job, Generation(generation), Generation(1), 0, SUBMITTER.sign(GOOD.canonical())
    )
    stream = await n.stream(sender)
    await stream.send(pack(inquire), GOOD.canonical())
    found = await answer(stream)
    assert isinstance(found, Answer)
    return found


def promised(disk: Path) -> dict[str, Any]:
    found = json.loads((disk / GOOD.job / TENANCY_NAME).read_text())
    assert isinstance(found, dict)
    return found


async def test_what_is_let_go_makes_the_room_in_which_that_is_written(
    tmp_path: Path, disk: Path
) -> None:
    async with node(tmp_path) as n:
        stream = await held(n)
        folder = stage_directory(disk / GOOD.job, 0)
        folder.mkdir()
        (folder / "0.update").write_bytes(bytes(1 << 15))
        fill(disk)
        await stream.send(pack(Release(GOOD.job, "done", is_over=True)))
        await n.logs("job left")
        assert n.service.hosts() == ()
        assert not folder.exists()
        assert (promised(disk)["released"], promised(disk)["over"]) == (True, True)
    async with node(tmp_path) as n:
        found = await asked(n, 2)
        assert (found.is_over, found.granted) == (True, False)


async def test_who_has_no_room_even_then_is_free_and_promises_no_less(
    tmp_path: Path, disk: Path
) -> None:
    async with node(tmp_path) as n:
        stream = await held(n)
        ballast = fill(disk)
        await stream.send(pack(Release(GOOD.job, "done", is_over=True)))
        await n.logs("job left")
        assert n.service.hosts() == (), "its place is free for another job"
        assert not promised(disk)["released"]
        assert n.service.papers(GOOD.job) is None, "it does not stand for election"
        for sender in (SUBMITTER, STRANGER):
            found = await asked(n, 2, sender)
            assert (found.is_over, found.granted, found.promised) == (True, False, 1)
        ballast.unlink()
        await n.logs("release written")
        assert (promised(disk)["released"], promised(disk)["over"]) == (True, True)
        assert (await asked(n, 2)).is_over
        (failure,) = [fields for name, fields in n.logged if name == "job failed"]
        assert "No space left" in str(failure["reason"])


async def test_who_takes_part_again_has_nothing_left_to_write(tmp_path: Path, disk: Path) -> None:
    async with node(tmp_path) as n:
        stream = await held(n)
        ballast = fill(disk)
        await stream.send(pack(Release(GOOD.job, "others have the slots")))
        await n.logs("job left")
        ballast.unlink()
        again = await n.stream()
        await again.send(pack(assign(plan=plan(generation=2))), GOOD.canonical())
        assert isinstance(await answer(again), Failed)
        assert (promised(disk)["released"], promised(disk)["promised"]) == (False, 2)
        assert len(n.service.hosts()) == 1
