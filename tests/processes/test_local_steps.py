"""Local steps on real processes that die: each round is committed once, with the same bits."""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from swarmnode.cli.demo_kills import Killing, PlannedKill, draw_kills
from swarmnode.cli.demo_watch import JobWatch, Kill, Trial
from swarmnode.cli.display import Display
from swarmnode.cli.local_swarm import LocalSwarm
from swarmnode.cli.weights_hash import weights_sha256
from swarmnode.config import LOG_FILE
from swarmnode.coordinator.events import CommitRecord
from swarmnode.coordinator.journal import read_journal
from swarmnode.http.api import JobView
from tests.processes.conftest import job_file, serving, wait_for

pytestmark = [pytest.mark.processes, pytest.mark.long, pytest.mark.timeout(400)]
NODES, ROUNDS, CUT = 4, 24, 12
GRID = {"stages": 2, "slots": 2, "layers": [2, 2], "min_peers": 4}


@dataclass(frozen=True)
class Trained:
    weights: str
    losses: list[float | None]
    view: JobView
    kills: list[Kill]
    committed: list[int]
    checkpoint: Path


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    """Four daemons of our own: all of them may be killed here, the first one too."""
    with LocalSwarm(tmp_path_factory.mktemp("four"), NODES) as swarm:
        swarm.start()
        yield swarm


def asked(text: Path, sync: str, *, deterministic: bool) -> dict[str, Any]:
    run = {"steps": ROUNDS, "seed": 7, "deterministic": deterministic, "checkpoint_every": CUT}
    return job_file(text, "local", placement=GRID, run=run, codecs={"sync": sync})


def train(
    swarm: LocalSwarm, raw: dict[str, Any], text: Path, folder: Path,
    kills: tuple[PlannedKill, ...] = (),
) -> Trained:  # fmt: skip
    """Train with `kills` on the way; what came out of it."""
    job = swarm.node(0).client.submit(raw, text)
    said = io.StringIO()
    watch = JobWatch(swarm, job)
    trial = Trial(swarm, watch, Killing(kills, NODES, ROUNDS), Display(Console(file=said), ""))
    try:
        view = trial.run()
    except BaseException as error:
        error.add_note(said.getvalue())
        raise
    client = watch.client
    assert client.export(job, folder / "export") == ROUNDS
    if not kills:
        (*_, work) = client.export_checkpoint(job, folder / "checkpoint", CUT)
        assert work.step == CUT
    losses = client.losses(job)
    assert watch.node is not None
    records, _ = read_journal(swarm.node(watch.node).home / "jobs" / job / "journal")
    committed = [record.step for record in records if isinstance(record, CommitRecord)]
    client.stop(job)
    print(said.getvalue())
    weights = weights_sha256(folder / "export")
    return Trained(weights, losses, view, trial.kills, committed, folder / "checkpoint")


def test_diloco_gives_the_same_weights_whoever_is_killed_and_goes_on_from_a_checkpoint(
    four: LocalSwarm, text: Path, tmp_path: Path
) -> None:
    raw = asked(text, "diloco,every=3", deterministic=True)
    calm = train(four, raw, text, tmp_path / "calm")
    killed = train(four, raw, text, tmp_path / "killed", draw_kills(3, 5, NODES))
    assert len(killed.kills) == 3
    assert all(kill.recovery_s is not None for kill in killed.kills)
    assert calm.committed == killed.committed == list(range(ROUNDS))
    assert killed.losses == calm.losses
    assert killed.view.val_loss == calm.view.val_loss
    assert killed.weights == calm.weights
    first, *_, last = [loss for loss in calm.losses if loss is not None]
    assert last < first - 0.5
    four.wait_for_peers(NODES)
    client = four.node(0).client
    again, notes = client.submit_with_notes(
        {**raw, "model": {"resume": str(calm.checkpoint)}}, text
    )
    assert notes == ()
    wait_for(client, again, serving)
    assert client.losses(again) == calm.losses[CUT:], "momentum of the outer step and all"
    client.stop(again)


def test_sparseloco_commits_each_round_once_whoever_is_killed(
    four: LocalSwarm, text: Path, tmp_path: Path
) -> None:
    four.wait_for_peers(NODES)
    raw = asked(text, "sparseloco,every=3,outer=sgd2", deterministic=False)
    found = train(four, raw, text, tmp_path, draw_kills(2, 3, NODES))
    assert found.committed == list(range(ROUNDS))
    logs = [(node.home / LOG_FILE).read_text(encoding="utf-8") for node in four.nodes]
    assert not any("differ after step" in log for log in logs), "replicas are equal"
    known = [loss for loss in found.losses if loss is not None]
    assert all(map(math.isfinite, known))
    assert known[-1] < known[0] - 0.1
    assert found.view.codecs["sync"].startswith("sends=difference,every=3,topology=everyone")
    (coding,) = [each for each in found.view.codings if "topk64of4096" in each.codec]
    assert (coding.kind, coding.ratio > 80) == ("reduced", True), coding
