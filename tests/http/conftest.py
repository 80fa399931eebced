"""A fake node, its application in process, and the same over a real port."""

from collections.abc import AsyncIterator

import httpx
import pytest
from fake_node import TOKEN, FakeNode, served

from swarmnode.http.server import application
from swarmnode.telemetry import Metrics


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(version="0.1.0", peer="12D3KooWA")


@pytest.fixture
async def client(node: FakeNode, metrics: Metrics) -> AsyncIterator[httpx.AsyncClient]:
    app = application(node, metrics, TOKEN)
    transport = httpx.ASGITransport(app=app)
    headers = {"authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://127.0.0.1:1", headers=headers
    ) as http:
        yield http


@pytest.fixture
async def address(node: FakeNode, metrics: Metrics) -> AsyncIterator[str]:
    async with served(node, metrics) as (url, _task):
        yield url
