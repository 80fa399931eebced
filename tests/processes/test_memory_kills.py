"""Codecs with a memory on real processes that die: every step once, and the run ends."""

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from swarmnode.cli.demo_kills import Killing, draw_kills
from swarmnode.cli.demo_watch import JobWatch, Trial
from swarmnode.cli.display import Display
from swarmnode.cli.local_swarm import LocalSwarm
from swarmnode.config import LOG_FILE
from swarmnode.coordinator.events import CommitRecord, EvaluationRecord
from swarmnode.coordinator.journal import read_journal
from tests.processes.conftest import job_file

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
    said = io.StringIO()
    with LocalSwarm(tmp_path / "swarm", NODES) as swarm:
        swarm.start()
        raw = job_file(text, name, placement=GRID, run=run, data=data, codecs=codecs)
        job = swarm.node(0).client.submit(raw, text)
        watch = JobWatch(swarm, job)
        kills = draw_kills(3, 5, NODES)
        trial = Trial(swarm, watch, Killing(kills, NODES, STEPS), Display(Console(file=said), ""))
        try:
            view = trial.run()
        finally:
            print(said.getvalue())
        assert len(trial.kills) == 3
        assert all(kill.recovery_s is not None for kill in trial.kills)
        losses = watch.client.losses(job)
        assert watch.node is not None
        records, _ = read_journal(swarm.node(watch.node).home / "jobs" / job / "journal")
        logs = [(node.home / LOG_FILE).read_text(encoding="utf-8") for node in swarm.nodes]
    assert [r.step for r in records if isinstance(r, CommitRecord)] == list(range(STEPS))
    assert not any("differ after step" in log for log in logs), "replicas are equal"
    known = [loss for loss in losses if loss is not None]
    assert len(losses) == STEPS
    assert all(map(math.isfinite, known))
    assert known[-1] < known[0]
    evaluations = [r for r in records if isinstance(r, EvaluationRecord)]
    assert view.codecs == {"activation": "int8", "activation_gradient": "int8", **codecs}
    assert {r.codec for r in evaluations} == {view.val_codec}
    assert view.val_codec == ("bf16" if name == "aq" else "int8")
