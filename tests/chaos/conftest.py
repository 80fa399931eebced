"""One swarm for all faults, healed before each, and what an undisturbed job makes on it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from swarmnode.cli.local_swarm import LocalSwarm
from swarmnode.p2p.checkpoint_files import folder_weights_sha256
from tests.chaos.trial import NODES, Outcome, Trial
from tests.processes.conftest import text

__all__ = ["text"]


@pytest.fixture(scope="session")
def chaos_swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    """Four daemons that only tests of faults use: any of them may be killed."""
    with LocalSwarm(tmp_path_factory.mktemp("chaos"), NODES) as swarm:
        yield swarm
    assert not swarm.pids()


@pytest.fixture(scope="session")
def chaos_trial(chaos_swarm: LocalSwarm, text: Path) -> Trial:
    return Trial(chaos_swarm, text)


@pytest.fixture
def trial(chaos_trial: Trial) -> Iterator[Trial]:
    """Four daemons in good health."""
    chaos_trial.heal()
    yield chaos_trial
    for node in chaos_trial.swarm.nodes:
        if not node.processes():
            continue
        for job in node.client.jobs():
            if job.phase not in ("stopped", "failed", "handed over"):
                node.client.stop(job.job)


@pytest.fixture(scope="session")
def undisturbed(chaos_trial: Trial, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The oracle; what an export would hold is what is compared."""
    chaos_trial.heal()
    job = chaos_trial.submit("undisturbed")
    job.until(lambda view: view.phase == "serving")
    folder = tmp_path_factory.mktemp("undisturbed") / "export"
    chaos_trial.node(0).client.export(job.name, folder)
    found = job.outcome()
    assert found.weights == folder_weights_sha256(folder)
    return found
