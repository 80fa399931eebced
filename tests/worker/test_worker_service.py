"""What an assignment must satisfy before a node works for it; others are refused and counted."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from worker_node import GOOD, ME, STRANGER, SUBMITTER, answer, assign, manifest, node, plan

from swarmnode.domain import Generation, JobId
from swarmnode.errors import PeerLostError
from swarmnode.heartbeats import Ping
from swarmnode.messages import (
    Answer,
    Begin,
    Failed,
    Message,
    Release,
)
from swarmnode.p2p.identity import Identity
from swarmnode.p2p.ports import EndOfStream
from swarmnode.wire import pack
from swarmnode.worker import fetching
from swarmnode.worker.service import MAX_JOBS


@pytest.fixture(autouse=True)
def _without_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody here serves blobs: to be refused once is enough."""
    monkeypatch.setattr(fetching, "RETRY_S", ())


# ---- what is taken -----------------------------------------------------------------------------


async def test_a_signed_assignment_of_its_submitter_is_taken(tmp_path: Path) -> None:
    async with node(tmp_path) as n:
        stream = await n.stream()
        await stream.send(pack(assign()), GOOD.canonical())
        failed = await answer(stream)  # as it should: nobody has the data
        assert isinstance(failed, Failed)
        assert (failed.job, failed.generation) == (GOOD.job, 1)
        (host,) = n.service.hosts()
        assert (host.manifest, host.plan, host.child_pid) == (GOOD, plan(), None)
        assert n.dropped == {}
        await stream.send(pack(Release(GOOD.job, "done")))
        await n.logs("job left")
        assert n.service.hosts() == ()


async def test_a_node_may_assign_to_itself(tmp_path: Path) -> None:
    job = manifest(submitter=ME.peer)
    own = assign(job, plan=plan(coordinator=ME.peer), signature=ME.sign(job.canonical()))
    async with node(tmp_path) as n:
        stream = await n.stream(ME)
        await stream.send(pack(own), job.canonical())
        assert isinstance(await answer(stream), Failed)
        assert [host.job for host in n.service.hosts()] == [job.job]


async def test_a_newer_stream_for_a_job_replaces_the_older_one(tmp_path: Path) -> None:
    async with node(tmp_path) as n:
        older, newer = await n.stream(), await n.stream()
        await older.send(pack(assign()), GOOD.canonical())
        assert isinstance(await answer(older), Failed)
        (first,) = n.service.hosts()
        await newer.send(pack(assign(plan=plan(generation=2))), GOOD.canonical())
        failed = await answer(newer)
        assert isinstance(failed, Failed)
        assert failed.generation == 2
        with pytest.raises((EndOfStream, PeerLostError)):
            await answer(older)
        (second,) = n.service.hosts()
        assert second is first, "what it holds outlives the stream"


async def test_two_jobs_are_hosted_side_by_side(tmp_path: Path) -> None:
    other = manifest(name="other")
    async with node(tmp_path) as n:
        streams = []
        for job in (GOOD, other):
            streams.append(await n.stream())
            await streams[-1].send(pack(assign(job)), job.canonical())
            assert isinstance(await answer(streams[-1]), Failed)
        assert {host.job for host in n.service.hosts()} == {GOOD.job, other.job}
        await streams[0].send(pack(Release(GOOD.job, "done")))
        await n.logs("job left")
        assert [host.job for host in n.service.hosts()] == [other.job]


async def test_a_full_node_refuses_one_more_job_but_not_a_newer_stream_of_its_own(
    tmp_path: Path,
) -> None:
    jobs = [manifest(name=f"job-{number}") for number in range(MAX_JOBS + 1)]
    async with node(tmp_path) as n:
        for job in jobs[:MAX_JOBS]:
            stream = await n.stream()
            await stream.send(pack(assign(job)), job.canonical())
            assert isinstance(await answer(stream), Failed)
        before = {host.job for host in n.service.hosts()}
        refused = await n.stream()
        await refused.send(pack(assign(jobs[-1])), jobs[-1].canonical())
        with pytest.raises((EndOfStream, PeerLostError)):
            await answer(refused)
        reason = (await n.logs("assignment refused"))["reason"]
        assert reason == f"this node works for {MAX_JOBS} jobs already"
        again = await n.stream()
        newer = assign(jobs[0], plan=plan(generation=2))
        await again.send(pack(newer), jobs[0].canonical())
        assert isinstance(await answer(again), Failed)
        assert {host.job for host in n.service.hosts()} == before
        assert n.dropped == {"bad_assignment": 1}


async def test_an_assignment_that_comes_twice_is_carried_out_once(tmp_path: Path) -> None:
    async with node(tmp_path) as n:
        for count in range(2):
            stream = await n.stream()
            await stream.send(pack(assign()), GOOD.canonical())
            said = await answer(stream)
            if count == 0:
                assert isinstance(said, Failed), "there is nothing to compute with here"
            else:
                assert isinstance(said, Answer)
                assert (said.granted, said.promised, said.adopted) == (False, 1, 1)


async def test_a_coordinator_that_dies_is_waited_for(tmp_path: Path) -> None:
    async with node(tmp_path) as n:
        stream = await n.stream()
        await stream.send(pack(assign()), GOOD.canonical())
        assert isinstance(await answer(stream), Failed)
        n.network.kill(SUBMITTER.peer)
        fields = await n.logs("coordinator lost")
        assert fields["job"] == GOOD.job
        assert [host.job for host in n.service.hosts()] == [GOOD.job]


# ---- what is refused ---------------------------------------------------------------------------

TAMPERED = replace(assign(), signature=bytes(64))
OTHER = manifest(name="other")
NOT_CANONICAL = json.dumps(json.loads(GOOD.canonical())).encode()
ILL = json.dumps({**json.loads(GOOD.canonical()), "run_this": 1}).encode()


@pytest.mark.parametrize(
    ("sender", "message", "payload", "reason"),
    [
        (SUBMITTER, TAMPERED, GOOD.canonical(), "signature is wrong"),
        (SUBMITTER, replace(TAMPERED, signature=b""), GOOD.canonical(), "signature is wrong"),
        (
            SUBMITTER,
            assign(signature=STRANGER.sign(GOOD.canonical())),
            GOOD.canonical(),
            "signature is wrong",
        ),
        (
            SUBMITTER,
            assign(signature=SUBMITTER.sign(OTHER.canonical())),
            GOOD.canonical(),
            "signature is wrong",
        ),
        (STRANGER, assign(), GOOD.canonical(), "does not coordinate"),
        (
            STRANGER,
            assign(plan=plan(coordinator=STRANGER.peer)),
            GOOD.canonical(),
            "does not coordinate",
        ),
        (
            SUBMITTER,
            assign(plan=plan(coordinator=STRANGER.peer)),
            GOOD.canonical(),
            "does not coordinate",
        ),
        (SUBMITTER, assign(), OTHER.canonical(), "not the one that its job id names"),
        (SUBMITTER, assign(job=OTHER), GOOD.canonical(), "not the one that its job id names"),
        (SUBMITTER, assign(), NOT_CANONICAL, "not the one that its job id names"),
        (SUBMITTER, assign(), ILL, "unknown key 'run_this'"),
        (SUBMITTER, assign(), b"", "without a manifest"),
        (SUBMITTER, assign(), b"{", "Expecting"),
        (SUBMITTER, assign(), b"\xff", "codec can't decode"),
        (SUBMITTER, assign(), b"null", "manifest"),
        (SUBMITTER, assign(plan=plan(host=STRANGER.peer)), GOOD.canonical(), "gives us nothing"),
        (
            SUBMITTER,
            assign(plan=replace(plan(), slots=())),
            GOOD.canonical(),
            "gives us nothing",
        ),
        (SUBMITTER, Begin(GOOD.job, Generation(1), 0), b"", "begins with a question"),
        (SUBMITTER, Ping(JobId("x")), b"", "begins with a question"),
    ],
    ids=[
        "zeros for a signature",
        "no signature",
        "signed by a stranger",
        "signature of another manifest",
        "passed on by a stranger",
        "taken over by a stranger",
        "for another coordinator",
        "another manifest",
        "another job id",
        "not canonical",
        "unknown key",
        "no manifest",
        "half a manifest",
        "no text",
        "null",
        "nothing for us",
        "nothing for anybody",
        "begin",
        "heartbeat",
    ],
)
async def test_a_bad_assignment_is_refused_and_counted(
    tmp_path: Path, sender: Identity, message: Message, payload: bytes, reason: str
) -> None:
    async with node(tmp_path) as n:
        assert reason in await n.is_refused(sender, pack(message), payload)


@pytest.mark.parametrize("data", [b"", b"\0\0\0\0", b"nonsense", b"\0\0\0\3\x81\x90\x01"])
async def test_bytes_that_are_no_message_are_refused_and_counted(
    tmp_path: Path, data: bytes
) -> None:
    async with node(tmp_path) as n:
        assert await n.is_refused(STRANGER, data)


async def test_after_a_refusal_a_good_assignment_is_still_taken(tmp_path: Path) -> None:
    async with node(tmp_path) as n:
        await n.is_refused(SUBMITTER, pack(TAMPERED), GOOD.canonical())
        stream = await n.stream()
        await stream.send(pack(assign()), GOOD.canonical())
        assert isinstance(await answer(stream), Failed)
        assert len(n.service.hosts()) == 1


async def test_a_bad_assignment_does_not_end_the_job_that_runs(tmp_path: Path) -> None:
    async with node(tmp_path) as n:
        stream = await n.stream()
        await stream.send(pack(assign()), GOOD.canonical())
        assert isinstance(await answer(stream), Failed)
        before = n.service.hosts()
        for sender in (STRANGER, SUBMITTER):
            bad = await n.stream(sender)
            await bad.send(pack(TAMPERED), GOOD.canonical())
            with pytest.raises((EndOfStream, PeerLostError)):
                await answer(bad)
        assert n.service.hosts() == before
        assert n.dropped == {"bad_assignment": 2}


def deep_list() -> bytes:
    return b"[" * 100_000


def deep_config() -> bytes:
    """Valid JSON of a valid manifest, but for a config of 300 tables in each other."""
    raw = json.loads(GOOD.canonical())
    config: dict[str, Any] = {}
    for _ in range(300):
        config = {"a": config}
    return json.dumps({**raw, "model": {**raw["model"], "config": config}}).encode()


@pytest.mark.parametrize("payload", [deep_list, deep_config])
async def test_a_manifest_that_is_nested_too_deeply_is_refused_and_counted(
    tmp_path: Path, payload: Callable[[], bytes]
) -> None:
    async with node(tmp_path) as n:
        assert await n.is_refused(STRANGER, pack(assign()), payload())


async def test_nonsense_from_the_coordinator_of_a_running_job_is_not_logged_as_our_bug(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with node(tmp_path) as n:
        stream = await n.stream()
        await stream.send(pack(assign()), GOOD.canonical())
        assert isinstance(await answer(stream), Failed)
        await stream.send(b"nonsense")
        await n.logs("coordinator lost")
        with pytest.raises((EndOfStream, PeerLostError)):
            await answer(stream)
    assert "Traceback" not in caplog.text
