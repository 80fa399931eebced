"""How good and how fast placements are, on public networks and on irregular swarms.

    python benchmarks/placement.py [--data DIR] [--only NAME] [--quick] [--runs 5]

Each solve runs in a process of its own: processor seconds are those of that process from the
first call of the solver on (loading of compiled kernels included, imports not), memory is its
peak. The first solve of each kind is run once before it is measured, so that kernels are compiled.
"of random" is the cost as a share of the mean over random arrangements as they come; "of paired"
the same over random stages whose lanes are paired and, up to 12 stages, ordered as well as can be.
Networks of other projects (`tc4`, `tc5`, SkipPipe, Helix) are read from --data where it has them.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from _environment import environment
from _placement_runs import CHURN_NODES, child
from rich.console import Console
from rich.table import Table

GRIDS = {16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16), 512: (16, 32),
         1000: (25, 40)}  # fmt: skip
"""Stages and pipelines by size of an irregular swarm."""
COLUMNS = ("instance", "cost", "of random", "of paired", "bound", "gap", "CPU s", "MiB", "spread")
MOVES = {512: 4_000_000, 1000: 4_000_000}
NUM_RANDOM = 200
SMALL = ((2, 3), (2, 4), (4, 2), (3, 3), (3, 4), (4, 4))
FILES = ("tc4_regional", "tc5_worldwide", "skippipe_gcp12", "helix_single24_llama70b")


@dataclass(frozen=True)
class Case:
    """One instance that is solved with several seeds."""

    group: str
    name: str
    network: Mapping[str, Any]
    """How the child makes the network."""
    grid: tuple[int, int] | None = None
    options: Mapping[str, Any] | None = None


def cases(data: Path | None) -> Iterator[Case]:
    """Everything but small instances and churn, which have runs of their own."""
    for number in range(5):
        yield Case("dtfm", f"dtfm case {number}", {"dtfm": number}, (8, 8))
    for size, grid in GRIDS.items():
        yield Case("irregular", f"irregular {size}", {"irregular": size}, grid)
    for name in FILES:
        path = data / f"{name}.json" if data is not None else Path(f"{name}.json")
        if data is None or not path.exists():
            print(f"skipped: {name}, no such file (give --data DIR)", file=sys.stderr)
            continue
        network = {"file": str(path.resolve())}
        if name.startswith("helix"):
            for hops in (None, 9, 12, 16):
                limit = f"helix, at most {hops} hops" if hops else "helix"
                yield Case("serving", limit, network, None, {"max_hops": hops})
        else:
            grid = (3, 4) if name.startswith("skippipe") else (8, 8)
            yield Case("files", name, network, grid)
    yield Case("training", "uneven devices", {"irregular": 16}, None, {"objective": "training"})


def ask(**request: Any) -> Any:
    """A fresh process's answer."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(request)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"least": min(values), "median": median(values), "most": max(values)}


class Report:
    """JSON lines as they come, a table in the end."""

    def __init__(self) -> None:
        self._environment = environment(["numpy", "scipy", "numba", "ortools"])
        self._table = Table(title="placement: medians over the seeds")
        for column in (
            "instance",
            "cost",
            "of random",
            "of paired",
            "bound",
            "gap",
            "CPU s",
            "MiB",
            "spread",
        ):
            self._table.add_column(column, justify="left" if column == "instance" else "right")

    def line(self, bench: str, **facts: Any) -> None:
        print(json.dumps({"bench": bench, **facts, **self._environment}), flush=True)

    def row(self, *cells: str) -> None:
        self._table.add_row(*cells)

    def show(self) -> None:
        Console(stderr=True, width=110).print(self._table)


def run_case(case: Case, runs: int, is_quick: bool, report: Report) -> None:
    """All seeds of one case."""
    size = case.network.get("irregular", 64)
    moves = 200_000 if is_quick else MOVES.get(size, 2_000_000)
    shared = {"case": case.__dict__}
    ask(do="solve", seed=0, moves=1000, **shared)  # compiles what it needs
    found = [ask(do="solve", seed=seed, moves=moves, **shared) for seed in range(runs)]
    random = ask(do="random", count=NUM_RANDOM, **shared)
    costs = [one["cost_s"] for one in found]
    middle = median(costs)
    ratio = middle / random["random_mean_s"] if "random_mean_s" in random else None
    paired = middle / random["random_paired_mean_s"] if "random_paired_mean_s" in random else None
    bound = max((one["bound_s"] for one in found if one["bound_s"] is not None), default=None)
    gap = (middle - bound) / middle if bound is not None else None
    optimal = all(one["is_optimal"] for one in found)
    report.line(
        "placement", name=case.name, grid=case.grid, options=case.options, moves=moves,
        seeds=list(range(runs)), cost_s=spread(costs), bound_s=bound, gap=gap,
        num_optimal=sum(one["is_optimal"] for one in found), **random,
        ratio_to_random=ratio, ratio_to_paired=paired,
        cpu_s=spread([one["cpu_s"] for one in found]),
        peak_mib=max(one["peak_mib"] for one in found), parts=found[0]["parts"],
    )  # fmt: skip
    report.row(
        case.name,
        f"{1 / middle:.1f} tok/s" if case.group == "serving" else f"{middle:.4f} s",
        f"{ratio:.3f}" if ratio else "",
        f"{paired:.3f}" if paired else "",
        f"{bound:.4g}" if bound is not None else "",
        "optimal" if optimal else f"{100 * gap:.1f} %" if gap is not None else "",
        f"{median(one['cpu_s'] for one in found):.2f}",
        f"{max(one['peak_mib'] for one in found):.0f}",
        f"{100 * (max(costs) / min(costs) - 1):.2f} %",
    )


def run_small(runs: int, is_quick: bool, report: Report) -> None:
    """Random small instances against an oracle."""
    for grid in SMALL[: 4 if is_quick else None]:
        limit_s = 20.0 if is_quick else 180.0
        found = [ask(do="small", grid=grid, seed=seed, limit_s=limit_s) for seed in range(runs)]
        proven = [one for one in found if one["oracle_status"] == "optimal"]
        hits = sum(one["excess"] <= 1e-6 for one in proven)
        report.line(
            "placement small", grid=grid, num_instances=runs, num_proven=len(proven),
            num_hit=hits, excess=spread([one["excess"] for one in found]),
            oracle=found[0]["oracle"], cpu_s=spread([one["cpu_s"] for one in found]),
            oracle_cpu_s=spread([one["oracle_cpu_s"] for one in found]),
            num_own_proofs=sum(one["is_optimal"] for one in found),
        )  # fmt: skip
        report.row(
            f"{grid[0]} x {grid[1]}, {found[0]['oracle']}", f"{hits} of {len(proven)} hit",
            "", "", "",
            f"{sum(one['is_optimal'] for one in found)} proven",
            f"{median(one['cpu_s'] for one in found):.2f}", "",
            f"{100 * max(one['excess'] for one in found):.3f} %",
        )  # fmt: skip


def run_churn(runs: int, is_quick: bool, report: Report) -> None:
    """Traces of nodes that come and go."""
    moves = 200_000 if is_quick else 20_000_000
    ask(do="churn", seed=0, moves=1000)
    rounds = [one for seed in range(runs) for one in ask(do="churn", seed=seed, moves=moves)]
    over = [one["over_cold"] for one in rounds]
    moved = [float(one["num_moved"]) for one in rounds]
    report.line(
        "placement churn", nodes=64, leave_and_join=CHURN_NODES, rounds=len(rounds), moves=moves,
        over_cold=spread(over), num_moved=spread(moved),
        **{key: spread([r[key] for r in rounds])
           for key in ("cost_s", "cold_s", "first_s", "first_cpu_s", "cpu_s")},
    )  # fmt: skip
    report.row(
        f"churn, {CHURN_NODES} of 64", f"{median(r['cost_s'] for r in rounds):.2f} s",
        f"moved {median(moved):.0f}, at most {max(moved):.0f}", "", "",
        f"{100 * median(over):+.1f} % of cold, at most {100 * max(over):+.1f} %",
        f"{median(r['cpu_s'] for r in rounds):.2f}", "",
        f"first {1e3 * median(r['first_cpu_s'] for r in rounds):.0f} ms",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with networks of other projects")
    parser.add_argument("--only", default="", help="run only what has this in its name")
    parser.add_argument("--quick", action="store_true", help="few moves, fewer sizes")
    parser.add_argument("--runs", type=int, default=5, help="seeds")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(json.loads(options.child))))
        return
    runs = min(options.runs, 2) if options.quick else options.runs
    report = Report()
    for case in cases(options.data):
        is_large = options.quick and case.network.get("irregular", 0) > 256
        if options.only in case.name and not is_large:
            run_case(case, runs, options.quick, report)
    if options.only in "small":
        run_small(runs, options.quick, report)
    if options.only in "churn":
        run_churn(runs, options.quick, report)
    report.show()


if __name__ == "__main__":
    main()
