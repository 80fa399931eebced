"""No placement serves more than this: bounds from how many layers each node can carry at a rate.

In any placement that serves F tokens/s, every one of the L layers computes F tokens/s, and node i
with k layers adds at most min(T_i(k), F) to each of its k: so the sum over nodes of
max_k k * min(T_i(k), F) is at least L * F. Both sides over F fall with F on the left and stay on
the right, so the largest F is found by bisection. It is exact where the best placement is one
chain without slack. A limit on hops (or latency) joins with a multiplier mu: a token passes at
most H nodes, so sum_i x_i <= H * F, and every mu >= 0 gives a valid bound; the least is taken.
"""

from dataclasses import dataclass

import numpy as np

from swarmnode.coordinator.cost.serving import ServingInstance, ServingRules
from swarmnode.coordinator.topology import Matrix

ROUNDING = 1e-11
NUM_HALVINGS = 60
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, eq=False)
class _Kinds:
    """Nodes that are alike for the bound, once each with their number M. Shapes: (M,), (M, K)."""

    count: Matrix
    rate: Matrix
    layer_s: Matrix
    hop_s: Matrix
    """The least seconds from any other node."""


def throughput_bound(instance: ServingInstance, rules: ServingRules) -> tuple[float, str]:
    """The most tokens/s that any placement serves within the limits, and the argument."""
    kinds = _kinds(instance)
    ends = min(_ends_tokens_per_s(instance))
    free = _largest(kinds, instance.num_layers, ends, None)
    best, why = free, "each layer needs the whole flow, each node has room for few layers at it"
    if ends <= free:
        why = "no more gets in or out"
    limits: list[tuple[float, bool]] = [
        (hops, True) for hops in (rules.max_hops, rules.grid and rules.grid[0]) if hops
    ]
    if rules.max_latency_s is not None:
        slack_s = float(kinds.hop_s.max(initial=0.0))
        limits.append((rules.max_latency_s + slack_s, False))
    for limit, counts_hops in limits:
        tokens_per_s = _largest(kinds, instance.num_layers, best, (float(limit), counts_hops))
        if tokens_per_s < best:
            best = tokens_per_s
            why = f"chains of {limit} nodes" if counts_hops else "chains within the latency limit"
            why += " hold few layers at a high rate"
    return best * (1.0 + ROUNDING), why


def least_latency_s(instance: ServingInstance) -> float:
    """No chain has less latency: the quickest nodes, filled as far as they hold, parts allowed."""
    kinds = _kinds(instance)
    most = np.array([np.flatnonzero(row).max(initial=0) for row in kinds.rate], dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        each_s = np.where(most > 0, kinds.layer_s + kinds.hop_s / most, np.inf)
    left, total_s = float(instance.num_layers), -float(kinds.hop_s.max(initial=0.0))
    for m in np.argsort(each_s, kind="stable"):
        layers = min(left, float(most[m] * kinds.count[m]))
        if layers > 0:
            total_s += layers * float(each_s[m])
            left -= layers
    return max(0.0, total_s)


def fewest_hops(instance: ServingInstance) -> int:
    """No chain has fewer nodes; above N if no chain can hold the model."""
    most = sorted((int(np.flatnonzero(row).max(initial=0)) for row in instance.rate), reverse=True)
    held = np.cumsum(most)
    return int(np.searchsorted(held, instance.num_layers)) + 1


def _ends_tokens_per_s(instance: ServingInstance) -> tuple[float, float]:
    peak = instance.rate.max(axis=1, initial=0.0)
    source = np.minimum(instance.source_tokens_per_s, peak).sum()
    return float(source), float(np.minimum(instance.sink_tokens_per_s, peak).sum())


def _kinds(instance: ServingInstance) -> _Kinds:
    link = instance.link_tokens_per_s
    into = instance.source_tokens_per_s + link.sum(axis=0)
    out = instance.sink_tokens_per_s + link.sum(axis=1)
    rate = np.minimum(instance.rate, np.minimum(into, out)[:, None])
    usable = link > 0
    hop_s = np.where(usable, instance.latency_s, np.inf).min(axis=0, initial=np.inf)
    hop_s = np.where(np.isfinite(hop_s), hop_s, 0.0)
    rows = np.column_stack([instance.layer_s, hop_s, rate])
    rows, count = np.unique(rows, axis=0, return_counts=True)
    return _Kinds(count.astype(np.float64), rows[:, 2:], rows[:, 0], rows[:, 1])


def _largest(
    kinds: _Kinds, num_layers: int, most: float, limit: tuple[float, bool] | None
) -> float:
    """The largest flow up to `most` that the necessary condition allows, from above."""
    low, high = 0.0, most
    for _ in range(NUM_HALVINGS):
        if high - low <= 1e-13 * high:
            break
        middle = (low + high) / 2 if low or high < 1 else high / 2
        if _is_possible(kinds, num_layers, middle, limit):
            low = middle
        else:
            high = middle
    return most if _is_possible(kinds, num_layers, most, limit) else high


def _is_possible(
    kinds: _Kinds, num_layers: int, flow: float, limit: tuple[float, bool] | None
) -> bool:
    need = num_layers * flow * (1.0 - 1e-12)
    if _carried(kinds, flow, 0.0, None) < need:
        return False
    if limit is None or flow <= 0.0:
        return True
    low, high = 0.0, float(kinds.rate.shape[1])
    if not limit[1]:
        slowest = np.minimum(kinds.layer_s, 1.0)
        high = 1.0 / max(1e-12, float(slowest[slowest > 0].min(initial=1.0)))
        quick = kinds.hop_s[kinds.hop_s > 0].min(initial=1.0)
        high = max(high, kinds.rate.shape[1] / max(1e-12, float(quick)))
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = (_carried(kinds, flow, mu, limit) for mu in (left, right))
    for _ in range(NUM_HALVINGS):  # the sum is convex in mu: golden section finds its least
        if min(at_left, at_right) < need:
            return False
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = _carried(kinds, flow, left, limit)
        else:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = _carried(kinds, flow, right, limit)
    return True


def _carried(kinds: _Kinds, flow: float, mu: float, limit: tuple[float, bool] | None) -> float:
    """Layer tokens/s that all nodes can add at `flow`, with the limit priced at `mu`."""
    k = np.arange(kinds.rate.shape[1], dtype=np.float64)
    value = np.broadcast_to(k, kinds.rate.shape)
    extra = 0.0
    if limit is not None:
        most, counts_hops = limit
        per_layer = 0.0 if counts_hops else kinds.layer_s[:, None]
        per_node = 1.0 if counts_hops else kinds.hop_s[:, None]
        value = k * (1.0 - mu * per_layer) - mu * per_node
        extra = mu * most * flow
    carried = np.minimum(kinds.rate, flow) * np.maximum(value, 0.0)
    return float(carried.max(axis=1) @ kinds.count) + extra
