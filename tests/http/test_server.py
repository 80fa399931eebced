import asyncio
import signal
import subprocess
import sys
import time

import httpx
import pytest
from fake_node import TOKEN, FakeNode, served

from swarmnode.errors import BusyError, UserError
from swarmnode.http.server import application, serve
from swarmnode.telemetry import Metrics

AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}


async def test_metrics_health_and_page_need_no_token(
    client: httpx.AsyncClient, metrics: Metrics
) -> None:
    client.headers.pop("authorization")
    metrics.set_peers(3)
    text = (await client.get("/metrics")).text
    assert "\nswarmnode_peers 3.0\n" in text
    assert (await client.get("/health")).json() == {"status": "ok", "peer": "12D3KooWA"}
    page = await client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for name in ("page.css", "page.js"):
        assert name in page.text
        assert (await client.get(f"/{name}")).status_code == 200
    assert "http://" not in page.text
    assert "https://" not in page.text


async def test_an_unknown_address_is_one_clear_error(client: httpx.AsyncClient) -> None:
    answer = await client.get("/v1/nothing")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert (await client.delete("/api/jobs")).status_code == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example:1"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
    ],
)
async def test_a_foreign_web_page_reaches_nothing(
    client: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    for path in ("/v1/models", "/api/node", "/metrics"):
        assert (await client.get(path, headers=headers)).status_code == 403
    own = {"origin": "http://127.0.0.1:1"}
    assert (await client.get("/v1/models", headers=own)).status_code == 200


async def test_beyond_this_machine_the_models_need_the_token(
    node: FakeNode, metrics: Metrics
) -> None:
    app = application(node, metrics, TOKEN, host="0.0.0.0")
    transport = httpx.ASGITransport(app=app)
    body = {"model": "tiny", "prompt": "x"}
    async with httpx.AsyncClient(transport=transport, base_url="http://box.lan:80") as http:
        for headers in ({}, {"authorization": "Bearer wrong"}):
            answer = await http.post("/v1/completions", json=body, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert node.prompts == []
        answer = await http.post("/v1/completions", json=body, headers=AUTHORIZED)
        assert answer.status_code == 200


def test_the_server_brings_no_heavy_library() -> None:
    code = "import sys, swarmnode.http.server as s; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    loaded = set(done.stdout.split())
    assert "starlette" in loaded
    assert not loaded & {"torch", "transformers", "hivemind", "libp2p", "numpy", "fastapi"}


async def test_a_port_in_use_is_one_clear_line(address: str, metrics: Metrics) -> None:
    port = int(address.rsplit(":", 1)[1])
    with pytest.raises(BusyError, match=f"127.0.0.1:{port}: Address already in use"):
        await serve(FakeNode(), metrics, TOKEN, "127.0.0.1", port, lambda _port: None)
    with pytest.raises(UserError, match="cannot listen on"):
        await serve(FakeNode(), metrics, TOKEN, "256.1.1.1", 0, lambda _port: None)


async def test_cancelling_ends_within_a_second_with_streams_open(
    node: FakeNode, metrics: Metrics
) -> None:
    node.pause_after = 3
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    body = {"model": "tiny", "prompt": "x", "max_tokens": 50, "stream": True}
    async with httpx.AsyncClient(headers=AUTHORIZED) as http:
        async with served(node, metrics) as (url, task):
            generating = http.stream("POST", f"{url}/v1/completions", json=body)
            watching = http.stream("GET", f"{url}/api/jobs/tiny/watch")
            async with generating as tokens, watching as views:
                async with asyncio.timeout(5):
                    await anext(tokens.aiter_lines())
                    await anext(views.aiter_lines())
                now = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
                assert now == handlers
                assert node.num_open == 1
                begun_s = time.monotonic()
                task.cancel()
                await asyncio.wait([task])
                assert time.monotonic() - begun_s < 1.0
                assert node.num_open == 0
        with pytest.raises(httpx.ConnectError):
            await http.get(f"{url}/health")


async def test_a_waiting_request_without_a_stream_ends_as_well(
    node: FakeNode, metrics: Metrics
) -> None:
    node.pause_after = 1
    body = {"model": "tiny", "prompt": "x", "max_tokens": 50}

    async def ask(url: str) -> int:
        async with httpx.AsyncClient() as http:
            return (await http.post(f"{url}/v1/completions", json=body)).status_code

    async with asyncio.TaskGroup() as group, served(node, metrics) as (url, _task):
        asking = group.create_task(ask(url))
        async with asyncio.timeout(5):
            await node.opened.wait()
    assert asking.result() == 503
    assert node.num_open == 0
