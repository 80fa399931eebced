"""Draws a stress run: commits with what was killed, memory, file descriptors, disk."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import matplotlib.pyplot as plt
from _footprint import NodeSample, SwarmSample, lives_of

if TYPE_CHECKING:
    from stress import Beat

COLORS = {
    "coordinator": "#dc2626",
    "node": "#f59e0b",
    "worker": "#7c3aed",
    "directory": "#0891b2",
    "start": "#16a34a",
}
_THIN_S = 0.5
"""Commits are drawn this far apart; standstills longer than it stay as they were."""
_MB = 1e6


def draw(
    commits: Sequence[tuple[float, int]],
    beats: Sequence["Beat"],
    nodes: Sequence[NodeSample],
    swarm: Sequence[SwarmSample],
    path: Path,
) -> None:
    """Write the picture."""
    mpl.rcParams["svg.hashsalt"] = "swarmnode"
    figure, (steps, memory, files, disk) = plt.subplots(
        4, 1, figsize=(8, 8), sharex=True, layout="constrained", height_ratios=(2, 1, 1, 1)
    )
    thin = [commits[0]]
    for before, after in pairwise(commits):
        if after[0] - thin[-1][0] >= _THIN_S:
            thin += [before, after] if before != thin[-1] else [after]
    steps.plot(*zip(*thin, strict=True), color="#2563eb", linewidth=1.6)
    top = commits[-1][1]
    for row, (what, color) in enumerate(COLORS.items()):
        times = [beat.at_s for beat in beats if beat.what == what]
        label = f"{what} started" if what == "start" else f"{what} killed"
        steps.plot(
            times, [-top * 0.05 * (row + 1)] * len(times), "|", color=color,
            markersize=5, label=label.replace("start started", "node started"),
        )  # fmt: skip
    steps.set_yticks([tick for tick in steps.get_yticks() if 0 <= tick <= top])
    steps.set_ylabel("committed steps")
    steps.legend(frameon=False, ncols=5, fontsize=7, loc="upper left")
    _lives(memory, nodes, lambda sample: sample.daemon_uss_bytes / _MB)
    memory.set_ylabel("daemon, MB")
    _lives(files, nodes, lambda sample: sample.daemon_fds)
    files.set_ylabel("daemon, files")
    disk.plot([s.at_s for s in swarm], [s.disk_bytes / _MB for s in swarm], color="#2563eb")
    disk.set_ylabel("homes, MB")
    disk.set_xlabel("seconds")
    for axes in (memory, files, disk):
        axes.set_ylim(bottom=0)
    for axes in (steps, memory, files, disk):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def _lives(
    axes: plt.Axes, nodes: Sequence[NodeSample], value: Callable[[NodeSample], float]
) -> None:
    """One line for each life of a daemon."""
    for life in lives_of(nodes):
        axes.plot([s.at_s for s in life], [value(s) for s in life], ".-", linewidth=0.8, ms=2)
