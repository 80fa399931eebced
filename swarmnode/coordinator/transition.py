"""From one placement to the next: what moving costs, how long it will pay, and when it is worth it.

Only a change of stage moves weights; re-pairing inside a stage is free. Policy: a running job
moves when the time that it saves until the next change of the swarm is clearly more than the time
that the move takes. A swarm that changes often is calm for short, and so moves less.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swarmnode.coordinator.objective import NOBODY, Arrangement, Previous
from swarmnode.coordinator.topology import Topology

MARGIN = 2.0
"""What a move must save, in times of what it costs: predictions err."""
LEAST_GAIN = 0.15
"""Share of the step that a move must save: below that, measurements jitter as much."""
RESTART_S = 2.0
"""What any new generation costs beside moving state: the children start their stages again."""
PRIOR_CALM_S = 1800.0
"""The calm to expect of a swarm about which nothing is known yet."""
LONGEST_CALM_S = 6 * 3600.0


class Churn:
    """How often the swarm changes, and so how long a placement may hope to last."""

    def __init__(self, now_s: float) -> None:
        self._started_s = now_s
        self._num_changes = 0

    def changed(self) -> None:
        """A machine came or went."""
        self._num_changes += 1

    def calm_s(self, now_s: float) -> float:
        """Expected seconds to the next change: the mean so far, with one calm spell as a prior."""
        seen_s = PRIOR_CALM_S + now_s - self._started_s
        return min(LONGEST_CALM_S, seen_s / (1 + self._num_changes))


@dataclass(frozen=True)
class Move:
    """A change of placement that somebody proposes."""

    step_s: float
    """Seconds per step now."""
    new_step_s: float
    move_s: float
    """Seconds to fetch the state that must move."""

    def refusal(self, calm_s: float) -> str | None:
        """Why not to move, in words; None if it is worth it.

        `calm_s` is how long the new placement may hope to last.
        """
        gain = 1.0 - self.new_step_s / self.step_s if self.step_s > 0 else 0.0
        if gain < LEAST_GAIN:
            return f"saves {100 * max(0.0, gain):.1f} % of the step, too little to move for"
        saved_s, cost_s = gain * calm_s, self.move_s + RESTART_S
        if saved_s < MARGIN * cost_s:
            return f"saves {saved_s:.0f} s until the next change, but the move takes {cost_s:.0f} s"
        return None


def charges(
    previous: Arrangement,
    topology: Topology,
    state_bytes: Sequence[float],
    num_steps: float,
) -> Previous:
    """What each node pays to host each stage: seconds to fetch it, per step until the next change.

    The state comes from the holder with the fastest link; without any holder, from nowhere: that
    is charged as the slowest link. A node that held nothing pays nothing: whatever it hosts, it
    must fetch something. Shapes: charge_s (N, S).
    """
    count, num_stages = topology.num_nodes, len(previous.slots)
    charge_s = np.zeros((count, num_stages))
    survivors = set(previous.nodes)
    for stage, row in enumerate(previous.slots):
        holders = sorted({node for node in row if node != NOBODY})
        fetch_s = _fetch_s(topology, holders, state_bytes[stage])
        for node in survivors - set(holders):
            charge_s[node, stage] = fetch_s[node] / max(1.0, num_steps)
    return Previous(previous, charge_s)


def _fetch_s(topology: Topology, holders: Sequence[int], num_bytes: float) -> np.ndarray:
    """Seconds for each node to fetch a state from the holder that is best for it; finite."""
    seconds = topology.transfer_s(num_bytes)
    usable = seconds[np.isfinite(seconds)]
    slowest_s = float(usable.max()) if usable.size else 0.0
    if not holders:
        return np.full(topology.num_nodes, slowest_s)
    best = np.asarray(seconds[list(holders)].min(axis=0))
    return np.where(np.isfinite(best), best, slowest_s)


def move_seconds(
    previous: Arrangement, new: Arrangement, topology: Topology, state_bytes: Sequence[float]
) -> float:
    """Seconds until every host has its state: nodes fetch side by side, each its stages in turn."""
    held = {(node, s) for s, row in enumerate(previous.slots) for node in row}
    needed: dict[int, float] = {}
    for stage, row in enumerate(new.slots):
        holders = sorted({n for n in previous.slots[stage] if n != NOBODY})
        fetch_s = _fetch_s(topology, holders, state_bytes[stage])
        for node in set(row):
            if (node, stage) not in held:
                needed[node] = needed.get(node, 0.0) + float(fetch_s[node])
    return max(needed.values(), default=0.0)
