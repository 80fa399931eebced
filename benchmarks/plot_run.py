"""Draws a job's training loss by step from its journal, and where its placement changed.

python benchmarks/plot_run.py HOME/jobs/JOB/journal docs/demo-loss.svg
"""

import argparse
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

from swarmnode.coordinator.events import CommitRecord, EvaluationRecord
from swarmnode.coordinator.journal import read_journal

WINDOW = 10


def main() -> None:
    """Read the journal, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("journal", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    records, _ = read_journal(options.journal)
    commits = [record for record in records if isinstance(record, CommitRecord)]
    by_step = {record.step: record for record in commits}
    steps = sorted(by_step)
    losses = [by_step[step].loss for step in steps]
    smooth = [
        sum(losses[max(0, i - WINDOW + 1) : i + 1]) / len(losses[max(0, i - WINDOW + 1) : i + 1])
        for i in range(len(losses))
    ]
    mpl.rcParams["svg.hashsalt"] = "swarmnode"
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    axes.plot(steps, losses, color="#94a3b8", linewidth=0.8, label="each step")
    axes.plot(steps, smooth, color="#2563eb", linewidth=1.8, label=f"mean of {WINDOW} steps")
    for before, after in pairwise(commits):
        if after.generation != before.generation:
            axes.axvline(after.step, color="#dc2626", linestyle="--", linewidth=1.2)
            axes.annotate(
                "a worker is killed",
                (after.step, max(losses)),
                xytext=(6, -10),
                textcoords="offset points",
                color="#dc2626",
            )
    evaluations = [record for record in records if isinstance(record, EvaluationRecord)]
    if evaluations:
        x, y = [e.step for e in evaluations], [e.loss for e in evaluations]
        axes.plot(x, y, "o", color="#16a34a", label=f"held-out: {y[-1]:.3f}")
    axes.set_xlabel("committed step")
    axes.set_ylabel("loss, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(options.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
