"""Draws a full suite: held-out loss by step, by byte sent, by second on a slow line."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

LINE_BPS = 100e6
"""Of each slot's line, up; the third axis is time on it."""


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One curve a row of the first seed, from the first evaluation after the start.

    Seconds: what computing and coding took (the slots in turn, so over their number), and the
    bytes sent, as if each slot had a line of 100 Mbit/s and nothing overlapped.
    """
    mpl.rcParams["svg.hashsalt"] = "swarmnode"
    figure, (steps, sent, seconds) = plt.subplots(
        1, 3, figsize=(11, 3.8), sharey=True, layout="constrained"
    )
    first = min(row["seed"] for row in rows)
    for row in rows:
        if row["seed"] != first:
            continue
        num_steps = row["plan"]["num_steps"]
        at, losses = zip(*row["curve"][1:], strict=True)
        share = [step / num_steps for step in at]
        own_s = (row["compute_cpu_s"] + row["sync_cpu_s"]) / row["num_slots"]
        line_s = 8 * row["up_bytes"] / LINE_BPS
        steps.plot(at, losses, linewidth=1.2, label=row["method"])
        sent.plot([each * row["up_bytes"] / 1e6 for each in share], losses, linewidth=1.2)
        seconds.plot([each * (own_s + line_s) for each in share], losses, linewidth=1.2)
    steps.set_xlabel("step")
    steps.set_ylabel("held-out loss, nats per byte")
    sent.set_xscale("log")
    sent.set_xlabel("MB sent by a slot")
    seconds.set_xscale("log")
    seconds.set_xlabel("seconds: computing, then 100 Mbit/s up")
    for axes in (steps, sent, seconds):
        axes.spines[["top", "right"]].set_visible(False)
    steps.legend(frameon=False, fontsize=7)
    figure.savefig(path, metadata={"Date": None})
