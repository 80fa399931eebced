"""Local steps on real processes that die: each round is committed once, with the same bits."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swarmnode.cli.demo_kills import draw_kills
from swarmnode.cli.local_swarm import LocalSwarm
from tests.processes.conftest import job_file, serving, wait_for
from tests.processes.kills import replicas_agree, trained

pytestmark = [pytest.mark.processes, pytest.mark.long, pytest.mark.timeout(400)]
NODES, ROUNDS, CUT = 4, 24, 12
GRID = {"stages": 2, "slots": 2, "layers": [2, 2], "min_peers": 4}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    """Four daemons of our own: all of them may be killed here, the first one too."""
    with LocalSwarm(tmp_path_factory.mktemp("four"), NODES) as swarm:
        swarm.start()
        yield swarm


def asked(text: Path, sync: str, *, deterministic: bool) -> dict[str, Any]:
    run = {"steps": ROUNDS, "seed": 7, "deterministic": deterministic, "checkpoint_every": CUT}
    return job_file(text, "local", placement=GRID, run=run, codecs={"sync": sync})


def test_diloco_gives_the_same_weights_whoever_is_killed_and_goes_on_from_a_checkpoint(
    four: LocalSwarm, text: Path, tmp_path: Path
) -> None:
    raw = asked(text, "diloco,every=3", deterministic=True)
    checkpoint = tmp_path / "checkpoint"
    with trained(four, raw, text, tmp_path / "calm") as calm:
        (*_, work) = calm.client.export_checkpoint(calm.job, checkpoint, CUT)
        assert work.step == CUT
    with trained(four, raw, text, tmp_path / "killed", draw_kills(3, 5, NODES)) as killed:
        assert calm.committed == killed.committed == list(range(ROUNDS))
        assert killed.losses == calm.losses
        assert killed.view.val_loss == calm.view.val_loss
        assert killed.weights == calm.weights
    first, *_, last = [loss for loss in calm.losses if loss is not None]
    assert last < first - 0.5
    four.wait_for_peers(NODES)
    client = four.node(0).client
    again, notes = client.submit_with_notes({**raw, "model": {"resume": str(checkpoint)}}, text)
    assert notes == ()
    wait_for(client, again, serving)
    assert client.losses(again) == calm.losses[CUT:], "momentum of the outer step and all"
    client.stop(again)


def test_sparseloco_commits_each_round_once_whoever_is_killed(
    four: LocalSwarm, text: Path, tmp_path: Path
) -> None:
    four.wait_for_peers(NODES)
    raw = asked(text, "sparseloco,every=3,outer=sgd2", deterministic=False)
    with trained(four, raw, text, tmp_path, draw_kills(2, 3, NODES)) as found:
        assert found.committed == list(range(ROUNDS))
        assert replicas_agree(four)
    known = [loss for loss in found.losses if loss is not None]
    assert all(map(math.isfinite, known))
    assert known[-1] < known[0] - 0.1
    assert found.view.codecs["sync"].startswith("sends=difference,every=3,topology=everyone")
    (coding,) = [each for each in found.view.codings if "topk64of4096" in each.codec]
    assert (coding.kind, coding.ratio > 80) == ("reduced", True), coding
