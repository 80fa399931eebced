"""Throughput of a serving placement over the longest chain allowed: one JSON line per point.

python benchmarks/serving_front.py NETWORK.json docs/serving-front.svg [--moves N] [--seed N]

NETWORK.json is a Helix instance: layers, node_types, tokens_per_s_by_layers and link tables.
"""

import argparse
import json
import time
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from _environment import environment

from swarmnode.coordinator.cost.serving import ServingInstance, parse_serving
from swarmnode.coordinator.objective import Effort
from swarmnode.coordinator.solver.serving.front import FrontPoint, front
from swarmnode.coordinator.solver.serving.objective import ServingObjective
from swarmnode.coordinator.topology import load_network

PACKAGES = ("numpy", "numba")


def main() -> None:
    """Search each limit with exact and with partial ranges, print the points, draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--moves", type=int, default=2_000_000, help="for each limit")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    raw = load_network(options.network)
    instance = parse_serving(raw)
    case = {"network": raw.get("key", options.network.stem), "seed": options.seed}
    about = environment(PACKAGES)
    fronts = {}
    for partial in (False, True):
        shared = {**case, "ranges": "partial" if partial else "exact", **about}
        print(json.dumps({"bench": "serving", **_unlimited(instance, partial, options), **shared}))
        started_s = time.process_time()
        effort = Effort(moves=options.moves, seed=options.seed)
        points = front(instance, effort, partial=partial)
        cpu_s = round(time.process_time() - started_s, 2)
        fronts[partial] = points
        for point in points:
            line = {"bench": "serving_front", **_line(point), "moves": options.moves}
            print(json.dumps({**line, "whole_front_cpu_s": cpu_s, **shared}))
    _draw(fronts, raw.get("published_milp_objective", {}).get("ilp"), options.picture)


def _unlimited(
    instance: ServingInstance, partial: bool, options: argparse.Namespace
) -> dict[str, object]:
    """Without a limit, after a warm-up: what is found, the bound, and CPU seconds from nothing."""
    effort = Effort(moves=options.moves, seed=options.seed)
    for _ in range(2):  # the first round loads the compiled kernels
        started_s = time.process_time()
        objective = ServingObjective(instance, partial=partial)
        found = objective.search(objective.first(None), None, effort)
        cpu_s = time.process_time() - started_s
    parts = objective.price(found.arrangement).parts
    return {
        "tokens_per_s": round(parts["tokens_per_s"], 4),
        "bound_tokens_per_s": round(objective.top, 4),
        "is_optimal": found.is_optimal,
        "hops": round(parts["hops"]),
        "latency_s": parts["latency_s"],
        "moves_done": found.moves_done,
        "cpu_s": round(cpu_s, 4),
    }


def _line(point: FrontPoint) -> dict[str, object]:
    return {
        "max_hops": point.max_hops,
        "hops": point.hops,
        "tokens_per_s": round(point.tokens_per_s, 4),
        "bound_tokens_per_s": round(point.bound_tokens_per_s, 4),
        "latency_s": round(point.latency_s, 6),
    }


def _draw(
    fronts: dict[bool, tuple[FrontPoint, ...]], published: float | None, picture: Path
) -> None:
    """Steps for what was found, dots for what no placement can exceed."""
    mpl.rcParams["svg.hashsalt"] = "swarmnode"
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    styles = {False: ("#2563eb", "-", "ranges meet"), True: ("#16a34a", "--", "partial ranges")}
    for partial, points in fronts.items():
        color, line, label = styles[partial]
        limits = [point.max_hops for point in points]
        rates = [point.tokens_per_s for point in points]
        axes.step(limits, rates, line, where="post", color=color, linewidth=1.8, label=label)
    points = fronts[False]
    bounds = [point.bound_tokens_per_s for point in points]
    limits = [point.max_hops for point in points]
    axes.plot(limits, bounds, ":", color="#94a3b8", label="no placement exceeds")
    if published is not None:
        axes.axhline(published, color="#dc2626", linewidth=1.0, label="published MILP, no limit")
    axes.set_xlabel("most nodes that a token may pass")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
