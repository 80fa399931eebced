"""Whoever dies, and whenever: the weights of a deterministic job stay the same, bit for bit."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from swarmnode.cli.demo_kills import Killing, PlannedKill, draw_kills
from swarmnode.cli.demo_watch import JobWatch, Kill, Trial
from swarmnode.cli.display import Display
from swarmnode.cli.local_swarm import LocalSwarm
from swarmnode.cli.weights_hash import weights_sha256
from tests.processes.conftest import job_file

pytestmark = [pytest.mark.processes, pytest.mark.long, pytest.mark.timeout(300)]
NODES, STEPS = 4, 30
EXACT = {"stages": 2, "slots": 2, "layers": [2, 2], "min_peers": 4}


@dataclass(frozen=True)
class Trained:
    weights: str
    losses: list[float | None]
    val_loss: float | None
    kills: list[Kill]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    """Four daemons of our own: all of them may be killed here, the first one too."""
    with LocalSwarm(tmp_path_factory.mktemp("four"), NODES) as swarm:
        swarm.start()
        yield swarm


@pytest.fixture(scope="module")
def undisturbed(four: LocalSwarm, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(four, text, tmp_path_factory.mktemp("undisturbed"), ())


def train(
    swarm: LocalSwarm, text: Path, folder: Path, kills: tuple[PlannedKill, ...], seed: int = 7
) -> Trained:
    """Train with `kills` on the way; what came out of it."""
    run = {"steps": STEPS, "seed": seed, "deterministic": True}
    job = swarm.node(0).client.submit(job_file(text, "exact", placement=EXACT, run=run), text)
    said = io.StringIO()
    watch = JobWatch(swarm, job)
    trial = Trial(swarm, watch, Killing(kills, NODES, STEPS), Display(Console(file=said), ""))
    try:
        view = trial.run()
    except BaseException as error:
        error.add_note(said.getvalue())
        raise
    client = watch.client
    assert client.export(job, folder / "export") == STEPS
    losses = client.losses(job)
    client.stop(job)
    print(said.getvalue())
    return Trained(weights_sha256(folder / "export"), losses, view.val_loss, trial.kills)


@pytest.mark.parametrize("kill_seed", [5])
def test_kills_of_nodes_and_of_the_coordinator_change_nothing(
    four: LocalSwarm, text: Path, tmp_path: Path, undisturbed: Trained, kill_seed: int
) -> None:
    killed = train(four, text, tmp_path, draw_kills(3, kill_seed, NODES))
    assert len(killed.kills) == 3
    assert "coordinator" in {kill.what for kill in killed.kills}
    assert all(kill.recovery_s is not None for kill in killed.kills)
    assert killed.losses == undisturbed.losses
    assert len(killed.losses) == STEPS
    assert killed.val_loss == undisturbed.val_loss
    assert killed.weights == undisturbed.weights
    four.wait_for_peers(NODES)


def test_another_seed_gives_other_weights(
    four: LocalSwarm, text: Path, tmp_path: Path, undisturbed: Trained
) -> None:
    other = train(four, text, tmp_path, (), seed=8)
    assert other.weights != undisturbed.weights
    assert other.losses != undisturbed.losses
