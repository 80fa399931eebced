"""Draws a step of a traced job: what each node computed, what it waited for, what its line sent."""

from collections.abc import Sequence
from pathlib import Path

import _spans
import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

COLORS = {
    "forward": "#2563eb",
    "backward": "#7c3aed",
    "coding, sums, update": "#6b7280",
    "waits for a hidden state": "#fde68a",
    "waits for its gradient": "#fdba74",
    "waits for parameter gradients": "#fca5a5",
    "waits for commit, next step": "#e5e7eb",
    "sends hidden states": "#0891b2",
    "sends their gradients": "#d946ef",
    "sends parameter gradients": "#16a34a",
}
_WAITS = {
    "activation": "waits for a hidden state",
    "activation_gradient": "waits for its gradient",
    "gradient": "waits for parameter gradients",
    "reduced": "waits for parameter gradients",
}
_SENDS = {"activation": "sends hidden states", "activation_gradient": "sends their gradients"}

_LEAST_S = 0.005
"""Shorter coding is not drawn."""

Row = list[tuple[float, float, str]]


def draw(cases: Sequence[tuple[str, Sequence[_spans.NodeTrace], float, float]], path: Path) -> None:
    """One panel for each case: its title, the traces, and from when to when.

    Nodes of the first stage come first.
    """
    mpl.rcParams["svg.hashsalt"] = "swarmnode"
    longest_s = max(until_s - since_s for _, _, since_s, until_s in cases)
    figure, panels = plt.subplots(
        len(cases), 1, figsize=(10, 2.1 * len(cases) + 0.8), sharex=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for axes, (title, traces, since_s, until_s) in zip(panels[:, 0], cases, strict=True):
        ticks = []
        stages = [_spans.stage_of(trace) for trace in traces]
        order = sorted(range(len(stages)), key=lambda node: (stages[node], node))
        for place, node in enumerate(order):
            computed = _computed(traces[node], since_s, until_s)
            _bars(axes, computed, since_s, -place, 0.42)
            _bars(axes, _sent(traces, node, since_s, until_s), since_s, -place - 0.36, 0.22)
            ticks.append((-place + 0.05, f"node {node}, stage {stages[node]}"))
        axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks], fontsize=8)
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlim(0, longest_s)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    panels[-1, 0].set_xlabel("seconds since the step before was applied everywhere")
    figure.legend(
        handles=[Patch(color=color, label=name) for name, color in COLORS.items()],
        loc="outside lower center", ncols=5, frameon=False, fontsize=7,
    )  # fmt: skip
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _computed(trace: _spans.NodeTrace, since_s: float, until_s: float) -> Row:
    found: Row = [
        (wait.began_s, wait.ended_s, _WAITS.get(wait.cause, "waits for commit, next step"))
        for wait in _spans.waits(trace, since_s, until_s)
    ]
    for span in trace.worker:  # coding lies inside of forward and backward, and is drawn over it
        if since_s <= span.began_s < until_s:
            name = span.what if span.what in _spans.WORK else "coding, sums, update"
            if name not in _spans.WORK and span.seconds < _LEAST_S:
                continue
            found.append((span.began_s, min(span.ended_s, until_s), name))
    return found


def _sent(traces: Sequence[_spans.NodeTrace], node: int, since_s: float, until_s: float) -> Row:
    """A frame is on the line from when its sender began until it has arrived."""
    return [
        (move.began_s, move.arrived_s, _SENDS.get(move.kind, "sends parameter gradients"))
        for move in _spans.transfers(traces)
        if move.sender == node and since_s <= move.began_s < until_s
    ]


def _bars(axes: plt.Axes, row: Row, since_s: float, middle: float, height: float) -> None:
    for name, color in COLORS.items():
        spans = [(began - since_s, ended - began) for began, ended, what in row if what == name]
        axes.broken_barh(spans, (middle - height / 2, height), facecolors=color, linewidth=0)
