"""Whoever dies, and whenever: the weights of a deterministic job stay the same, bit for bit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swarmnode.cli.demo_kills import draw_kills
from swarmnode.cli.local_swarm import LocalSwarm
from tests.processes.conftest import job_file
from tests.processes.kills import Trained, trained

pytestmark = [pytest.mark.processes, pytest.mark.long, pytest.mark.timeout(300)]
NODES, STEPS = 4, 30
EXACT = {"stages": 2, "slots": 2, "layers": [2, 2], "min_peers": 4}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    """Four daemons of our own: all of them may be killed here, the first one too."""
    with LocalSwarm(tmp_path_factory.mktemp("four"), NODES) as swarm:
        swarm.start()
        yield swarm


def asked(text: Path, seed: int = 7) -> dict[str, Any]:
    run = {"steps": STEPS, "seed": seed, "deterministic": True}
    return job_file(text, "exact", placement=EXACT, run=run)


@pytest.fixture(scope="module")
def undisturbed(four: LocalSwarm, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    with trained(four, asked(text), text, tmp_path_factory.mktemp("undisturbed")) as found:
        return found


@pytest.mark.parametrize("kill_seed", [5])
def test_kills_of_nodes_and_of_the_coordinator_change_nothing(
    four: LocalSwarm, text: Path, tmp_path: Path, undisturbed: Trained, kill_seed: int
) -> None:
    kills = draw_kills(3, kill_seed, NODES)
    with trained(four, asked(text), text, tmp_path, kills) as killed:
        assert "coordinator" in {kill.what for kill in killed.kills}
        assert killed.losses == undisturbed.losses
        assert len(killed.losses) == STEPS
        assert killed.view.val_loss == undisturbed.view.val_loss
        assert killed.weights == undisturbed.weights
    four.wait_for_peers(NODES)


def test_another_seed_gives_other_weights(
    four: LocalSwarm, text: Path, tmp_path: Path, undisturbed: Trained
) -> None:
    with trained(four, asked(text, seed=8), text, tmp_path) as other:
        assert other.weights != undisturbed.weights
        assert other.losses != undisturbed.losses
