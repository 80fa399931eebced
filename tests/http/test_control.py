import asyncio
import json
import math
from pathlib import Path

import httpx
import pytest
from fake_node import JOB, TOKEN, FakeNode

from swarmnode import errors
from swarmnode.http.control import JOB as JOB_FORM
from swarmnode.http.control import thin
from swarmnode.http.failures import control_failure, raise_failure

SUBMISSION = {
    "name": "new",
    "model": {"config": "config.json"},
    "data": {"path": "text.txt"},
}


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer wrong", f"Basic {TOKEN}"])
async def test_without_the_token_every_verb_is_refused(
    client: httpx.AsyncClient, header: str | None
) -> None:
    client.headers.pop("authorization")
    headers = {} if header is None else {"authorization": header}
    for method, path in [
        ("GET", "/api/node"),
        ("GET", "/api/jobs"),
        ("POST", "/api/jobs"),
        ("POST", f"/api/jobs/{JOB}/stop"),
        ("GET", f"/api/jobs/{JOB}/checkpoints"),
        ("POST", f"/api/jobs/{JOB}/checkpoints/verify"),
        ("POST", f"/api/jobs/{JOB}/checkpoints/export"),
    ]:
        answer = await client.request(method, path, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["type"] == "AuthError"
        with pytest.raises(errors.AuthError, match="token"):
            raise_failure(answer.status_code, answer.json())


async def test_node_peers_and_jobs_are_what_the_node_says(
    client: httpx.AsyncClient, node: FakeNode
) -> None:
    assert (await client.get("/api/node")).json()["dropped"] == {"stale_frame": 2}
    peers = (await client.get("/api/peers")).json()
    assert [peer["is_self"] for peer in peers] == [True, False, False]
    (listed,) = (await client.get("/api/jobs")).json()
    assert listed["losses"] == []
    assert JOB_FORM.validate_python((await client.get("/api/jobs/tiny")).json()) == node.job(JOB)


async def test_a_diverged_loss_is_null_not_broken_json(
    client: httpx.AsyncClient, node: FakeNode
) -> None:
    node.change(loss=math.nan, losses=(1.0, math.inf))
    answer = (await client.get(f"/api/jobs/{JOB}")).json()
    assert answer["loss"] is None
    assert answer["losses"] == [1.0, None]


async def test_a_long_history_comes_thinned(client: httpx.AsyncClient, node: FakeNode) -> None:
    node.change(losses=tuple(float(i) for i in range(1000)))
    answer = (await client.get(f"/api/jobs/{JOB}?points=4")).json()
    assert answer["losses"] == [124.5, 374.5, 624.5, 874.5]
    assert (await client.get(f"/api/jobs/{JOB}?points=0")).status_code == 400
    assert thin((1.0, 2.0), 5) == (1.0, 2.0)


async def test_a_submitted_job_gets_an_id(client: httpx.AsyncClient) -> None:
    answer = await client.post("/api/jobs", json={"job": SUBMISSION, "base": "/data"})
    assert answer.status_code == 201
    assert (await client.get(f"/api/jobs/{answer.json()['job']}")).json()["name"] == "new"


@pytest.mark.parametrize(
    ("body", "needle"),
    [
        ({"job": SUBMISSION | {"nmae": "x"}, "base": "/data"}, "unknown key 'nmae'"),
        ({"job": SUBMISSION | {"name": "tiny"}, "base": "/data"}, "is taken"),
        ({"job": SUBMISSION}, "base"),
        ({"job": SUBMISSION, "base": "/data", "force": True}, "force"),
        ([], "the request"),
    ],
)
async def test_a_bad_submission_comes_back_as_a_manifest_error(
    client: httpx.AsyncClient, body: object, needle: str
) -> None:
    answer = await client.post("/api/jobs", json=body)
    assert answer.status_code == 400
    with pytest.raises(errors.ManifestError, match=needle):
        raise_failure(answer.status_code, answer.json())


async def test_a_request_that_never_ends_is_refused(client: httpx.AsyncClient) -> None:
    answer = await client.post("/api/jobs", content=b"x" * ((4 << 20) + 1))
    assert answer.status_code == 400
    assert "longer than" in answer.json()["error"]["message"]


async def test_stop_and_export_do_it(
    client: httpx.AsyncClient, node: FakeNode, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    answer = await client.post("/api/jobs/tiny/export", json={"directory": str(out)})
    assert answer.json() == {"step": 3, "directory": str(out)}
    again = await client.post("/api/jobs/tiny/export", json={"directory": str(out)})
    assert again.status_code == 409
    with pytest.raises(errors.BusyError):
        raise_failure(again.status_code, again.json())
    assert (await client.post("/api/jobs/tiny/stop")).json()["phase"] == "stopped"
    assert (await client.post("/api/jobs/nothing/stop")).status_code == 404


async def test_watch_tells_each_change_until_the_job_ends(address: str, node: FakeNode) -> None:
    headers = {"authorization": f"Bearer {TOKEN}"}
    seen = []
    async with (
        httpx.AsyncClient(base_url=address, headers=headers) as http,
        http.stream("GET", "/api/jobs/tiny/watch") as answer,
    ):
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                view = json.loads(line.removeprefix("data: "))
                seen.append((view["step"], view["phase"]))
                node.change(step=view["step"] + 1, phase="stopped" if len(seen) == 2 else "saving")
    assert seen == [(3, "training"), (4, "saving"), (5, "stopped")]


async def test_watching_nothing_is_not_found(client: httpx.AsyncClient) -> None:
    answer = await client.get("/api/jobs/nothing/watch")
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "NotFoundError")


@pytest.mark.parametrize(
    ("error", "status", "back"),
    [
        (errors.CapacityError("too few"), 503, errors.CapacityError),
        (errors.DataError("no text"), 400, errors.DataError),
        (errors.PeerLostError("p", "silent"), 503, errors.SwarmError),
        (errors.ChunkError("bad hash"), 500, errors.SwarmError),
    ],
)
def test_errors_survive_the_way(
    error: errors.SwarmError, status: int, back: type[errors.SwarmError]
) -> None:
    answer = control_failure(error)
    assert answer.status_code == status
    with pytest.raises(back, match=str(error)):
        raise_failure(answer.status_code, json.loads(bytes(answer.body)))


async def test_one_node_waits_for_one_client_only(address: str) -> None:
    headers = {"authorization": f"Bearer {TOKEN}"}
    async with (
        httpx.AsyncClient(base_url=address, headers=headers) as http,
        http.stream("GET", "/api/jobs/tiny/watch") as answer,
    ):
        assert answer.status_code == 200
        async with asyncio.timeout(5):
            assert (await http.get("/api/node")).status_code == 200
