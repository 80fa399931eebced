"""Real daemons for tests: one swarm of four that several modules share, and how to ask for jobs."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from swarmnode.cli.client import NodeClient
from swarmnode.cli.local_swarm import LocalSwarm
from swarmnode.http.api import JobView

TINY_LLAMA = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="session")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the shared swarm's daemons announce themselves to Prometheus."""
    return tmp_path_factory.mktemp("targets")


@pytest.fixture(scope="session")
def swarm(tmp_path_factory: pytest.TempPathFactory, targets: Path) -> Iterator[LocalSwarm]:
    """Four daemons; tests that kill a node start it again."""
    root = tmp_path_factory.mktemp("swarm")
    with LocalSwarm(root, 4, extra_args=("--targets", str(targets))) as running:
        running.start()
        yield running


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text that every Python has: some modules of its standard library."""
    import sysconfig

    folder = tmp_path_factory.mktemp("text")
    library = Path(sysconfig.get_path("stdlib"))
    for name in ("argparse.py", "ast.py", "dataclasses.py", "inspect.py", "typing.py"):
        (folder / name).write_bytes((library / name).read_bytes())
    return folder


def job_file(text: Path, name: str, **sections: Any) -> dict[str, Any]:
    """A small job on real text; sections are merged into the defaults."""
    job: dict[str, Any] = {
        "name": name,
        "model": {"config": TINY_LLAMA},
        "data": {"path": str(text)},
        "batch": {"rows": 2, "sequence_length": 64, "num_microbatches": 4},
        "placement": {"stages": 2, "slots": 2},
        "run": {"steps": 20, "seed": 3, "checkpoint_every": 10},
    }
    for section, values in sections.items():
        if isinstance(values, dict) and section in job:
            job[section] = {**job[section], **values}
        else:
            job[section] = values
    return job


def wait_for(
    client: NodeClient, job: str, holds: Callable[[JobView], bool], limit_s: float = 90.0
) -> JobView:
    """The job's view as soon as `holds`; fails with what it was if it never does."""
    deadline_s = time.monotonic() + limit_s
    while True:
        view = client.job(job)
        if holds(view):
            return view
        assert view.phase not in ("failed", "stopped"), f"{view.phase}: {view.reason}"
        assert time.monotonic() < deadline_s, view
        time.sleep(0.02)


def serving(view: JobView) -> bool:
    return view.phase == "serving"
