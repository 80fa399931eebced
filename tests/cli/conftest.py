"""A real HTTP server over the fake node, in a thread, with the files that a daemon leaves."""

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "http"))

from cli_runner import Cli
from fake_node import FakeNode

from swarmnode.http.server import serve
from swarmnode.telemetry import Metrics

TOKEN = "a-token-of-32-hexadecimal-digits"


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


@pytest.fixture
def home(node: FakeNode, tmp_path: Path) -> Iterator[Path]:
    """The home of a node that answers on a real port."""
    folder = tmp_path / "home"
    folder.mkdir()
    ready, loops, tasks = threading.Event(), [], []

    def bound(port: int) -> None:
        body = {"address": f"http://127.0.0.1:{port}", "pid": 1}
        (folder / "http.json").write_text(json.dumps(body))
        (folder / "token").write_text(TOKEN + "\n")
        ready.set()

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        metrics = Metrics(version="0.1.0", peer="12D3KooWA")
        async with asyncio.TaskGroup() as group:
            tasks.append(
                group.create_task(serve(node, metrics, TOKEN, "127.0.0.1", 0, bound), name="http")
            )

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert ready.wait(10)
    yield folder
    loops[0].call_soon_threadsafe(tasks[0].cancel)
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def cli(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(home, monkeypatch, capsys)
