"""Codecs with a memory on real processes that die: every step once, and the run ends."""

import math
from pathlib import Path

import pytest

from swarmnode.cli.demo_kills import draw_kills
from swarmnode.cli.local_swarm import LocalSwarm
from tests.processes.conftest import job_file
from tests.processes.kills import replicas_agree, trained

pytestmark = [pytest.mark.processes, pytest.mark.long, pytest.mark.timeout(400)]
NODES, STEPS = 4, 30
GRID = {"stages": 2, "slots": 2, "layers": [2, 2]}
CASES = {
    "cocktail": {"gradient": "cocktail/p0.1/k0.2/int4+ef"},
    "aq": {"activation": "aq/int4/32", "gradient": "int8"},
}
EIGHT_STEPS_BYTES = 8 * 4 * 2 * 64
"""Of text: the samples come again after eight steps."""


@pytest.mark.parametrize("name", CASES)
def test_kills_lose_and_double_no_step(name: str, text: Path, tmp_path: Path) -> None:
    codecs = CASES[name]
    data = {"path": str(text), "max_bytes": EIGHT_STEPS_BYTES}
    run = {"steps": STEPS, "seed": 7, "deterministic": True}
    raw = job_file(text, name, placement=GRID, run=run, data=data, codecs=codecs)
    with LocalSwarm(tmp_path / "swarm", NODES) as swarm:
        swarm.start()
        with trained(swarm, raw, text, tmp_path, draw_kills(3, 5, NODES)) as found:
            assert found.committed == list(range(STEPS))
            assert replicas_agree(swarm)
    known = [loss for loss in found.losses if loss is not None]
    assert len(found.losses) == STEPS
    assert all(map(math.isfinite, known))
    assert known[-1] < known[0]
    view = found.view
    assert view.codecs == {"activation": "int8", "activation_gradient": "int8", **codecs}
    assert {evaluation.codec for evaluation in found.evaluations} == {view.val_codec}
    assert view.val_codec == ("bf16" if name == "aq" else "int8")
