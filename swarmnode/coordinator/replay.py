"""A ledger as its journal left it."""

from collections.abc import Sequence

from swarmnode.coordinator import events as on
from swarmnode.coordinator.ledger import Ledger


def replay(ledger: Ledger, records: Sequence[on.Record]) -> None:
    """Take up where a journal ends: the newest checkpoint, and what was known then."""
    for record in records:
        match record:
            case on.StartedRecord(generation, step):
                ledger.generation, ledger.step = generation, step
                ledger.progress.rewind(step)
            case on.CommitRecord() as commit:
                ledger.step = commit.step + 1
                ledger.progress.committed(commit.step, commit.loss, None)
            case on.CheckpointRecord() as checkpoint:
                ledger.checkpoint = checkpoint
            case on.EvaluationRecord(step, loss):
                ledger.progress.evaluated(step, loss)
            case on.EndRecord(phase, reason):
                ledger.phase, ledger.reason = phase, reason
    if records and not ledger.is_over:
        ledger.reason = "restarted; looking for peers"
