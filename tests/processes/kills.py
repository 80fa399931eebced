"""A job trained to its end on a swarm whose processes are killed on the way."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from swarmnode.cli.client import NodeClient
from swarmnode.cli.demo_kills import Killing, PlannedKill
from swarmnode.cli.demo_watch import JobWatch, Kill, Trial
from swarmnode.cli.display import Display
from swarmnode.cli.local_swarm import LocalSwarm
from swarmnode.cli.weights_hash import weights_sha256
from swarmnode.config import LOG_FILE
from swarmnode.coordinator.events import CommitRecord, EvaluationRecord
from swarmnode.coordinator.journal import read_journal
from swarmnode.http.api import JobView


@dataclass(frozen=True)
class Trained:
    job: str
    client: NodeClient
    """Of the node that coordinates at the end."""
    view: JobView
    kills: list[Kill]
    losses: list[float | None]
    weights: str
    """SHA-256 over all parameters."""
    committed: list[int]
    """Steps, as the coordinator's journal has them."""
    evaluations: list[EvaluationRecord]


@contextmanager
def trained(
    swarm: LocalSwarm, raw: dict[str, Any], text: Path, folder: Path,
    kills: tuple[PlannedKill, ...] = (),
) -> Iterator[Trained]:  # fmt: skip
    """Train with `kills` on the way, each of which must be recovered from; the job still serves."""
    num_steps, num_nodes = raw["run"]["steps"], len(swarm.nodes)
    job = swarm.node(0).client.submit(raw, text)
    said = io.StringIO()
    watch = JobWatch(swarm, job)
    killing = Killing(kills, num_nodes, num_steps)
    trial = Trial(swarm, watch, killing, Display(Console(file=said), ""))
    try:
        view = trial.run()
    except BaseException as error:
        error.add_note(said.getvalue())
        raise
    print(said.getvalue())
    assert len(trial.kills) == len(kills)
    assert all(kill.recovery_s is not None for kill in trial.kills)
    client = watch.client
    assert client.export(job, folder / "export") == num_steps
    assert watch.node is not None
    records, _ = read_journal(swarm.node(watch.node).home / "jobs" / job / "journal")
    found = Trained(
        job,
        client,
        view,
        trial.kills,
        client.losses(job),
        weights_sha256(folder / "export"),
        [record.step for record in records if isinstance(record, CommitRecord)],
        [record for record in records if isinstance(record, EvaluationRecord)],
    )
    try:
        yield found
    finally:
        client.stop(job)


def replicas_agree(swarm: LocalSwarm) -> bool:
    """Whether no daemon has ever seen two replicas of a stage differ."""
    logs = [(node.home / LOG_FILE).read_text(encoding="utf-8") for node in swarm.nodes]
    return not any("differ after step" in log for log in logs)
