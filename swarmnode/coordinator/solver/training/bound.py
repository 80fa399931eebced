"""A lower bound of every training step, by arguments that leave the network almost out.

Any arrangement takes at least its slowest pipeline's ramp and (m - 1) periods of its busiest
machine. The busiest machine: all work of one round, over all speeds, where no machine can take
more layers than fit into its memory. The ramp: a whole model's work on the fastest machines that
have room for it, and the cheapest hops between as many machines as that takes. Then every layer
is updated somewhere, and the step is reported.
"""

import numpy as np

from swarmnode.coordinator.cost.step_formula import Floats, Tables
from swarmnode.coordinator.objective import Bound


def step_bound(tables: Tables, num_layers: int, stages: int, slots: int) -> Bound:
    """No arrangement's step is shorter. Exact in the limits that the module's text names."""
    layer_s = np.maximum(tables.per_layer[0] * tables.flop_s, tables.per_layer[1] * tables.touch_s)
    state, slot = (float(tables.per_layer[3] * tables.per_weight[i]) for i in (0, 1))
    kept = float(tables.per_layer[2])  # of at least one microbatch
    column_caps = _caps(tables.room_bytes, state + slot + kept, num_layers)
    round_caps = slots * _caps(tables.room_bytes, state + slots * (slot + kept), num_layers)
    usable = tables.is_allowed.any(axis=1)
    column_caps, round_caps = column_caps * usable, round_caps * usable
    period = _least_period(layer_s, round_caps, num_layers * slots, stages * slots)
    ends = slots * tables.at_end[:, 0].sum()
    speeds = np.sort(np.where(usable, 1.0 / tables.flop_s, 0.0))[::-1][: stages * slots].sum()
    all_flops = slots * num_layers * tables.per_layer[0] + ends
    period = max(period, float(all_flops / speeds) if speeds > 0 else np.inf)
    ramp, num_nodes = _least_ramp(layer_s, column_caps, num_layers)
    ramp = max(ramp, float((all_flops / slots) * tables.flop_s[usable].min()))
    hops = max(0, num_nodes - 1) * _least_hop(tables)
    apply_s = tables.per_layer[3] * (tables.per_weight[2] + tables.per_weight[3] * tables.touch_s)
    wait = _least_period(apply_s, column_caps, num_layers, stages * slots)
    wait += float(np.sort(tables.wait_s)[max(0, num_nodes - 1)])
    through = tables.num_microbatches * period  # in all, a machine works off what it hosts
    seconds = max(ramp + hops + through - period, through) + wait
    why = f"all work over all speeds under the memory caps: {period:.3g} s a round"
    if num_nodes > 1:
        why += f"; the model takes {num_nodes} nodes at least: {ramp + hops:.3g} s of ramp"
    return Bound(seconds if np.isfinite(seconds) else 0.0, why)


def _caps(room_bytes: Floats, layer_bytes: float, num_layers: int) -> Floats:
    """Most layers that each machine has room for, as a number that need not be whole."""
    return np.minimum(num_layers, np.maximum(0.0, room_bytes) / max(layer_bytes, 1e-9))


def _least_period(layer_s: Floats, caps: Floats, num_layers: int, num_hosts: int) -> float:
    """Least maximum load with `num_layers` of work on at most `num_hosts` machines."""

    def room(period_s: float) -> float:
        taken = np.minimum(caps, period_s / layer_s)
        return float(np.sort(taken)[::-1][:num_hosts].sum())

    low, high = 0.0, num_layers * float(layer_s.max())
    if room(high) < num_layers:
        return float("inf")
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if room(middle) < num_layers else (low, middle)
    return low


def _least_ramp(layer_s: Floats, caps: Floats, num_layers: int) -> tuple[float, int]:
    """Least work of one whole model, fastest machines first; the fewest machines that hold it."""
    order = np.argsort(layer_s, kind="stable")
    before = np.concatenate(([0.0], np.cumsum(caps[order])[:-1]))
    taken = np.clip(num_layers - before, 0.0, caps[order])
    most = np.cumsum(np.sort(caps)[::-1])
    num_nodes = int((most < num_layers * (1.0 - 1e-12)).sum()) + 1
    return float((taken * layer_s[order]).sum()), min(num_nodes, len(caps))


def _least_hop(tables: Tables) -> float:
    """The cheapest way there and back of one microbatch between two machines."""
    there = tables.forward_out_s + tables.latency_s
    back = (tables.backward_out_s + tables.latency_s).T
    both = there + back
    np.fill_diagonal(both, np.inf)
    least = float(both.min())
    return least if np.isfinite(least) else 0.0
