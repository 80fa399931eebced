"""The full convergence suite: which rows, where they are kept, what they must show."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from _convergence_picture import draw
from _environment import environment
from _language import Corpus
from _synced_run import NUM_SLOTS, Plan, progress, run
from scipy.stats import t

from swarmnode.sync_specs import parse_sync

BASE = "allreduce"
SUITE = (BASE, "cocktail", "diloco", "sparseloco")
"""Those of the acceptance; any other preset, or text of a sync, may be named beside them."""
Row = dict[str, Any]
_KEY = ("method", "sync", "seed", "plan", "text", "text_bytes")


def bf16_all_reduce_bytes(num_parameters: int, num_slots: int, num_steps: int) -> float:
    """What each slot sends if gradients are summed as bf16 every step: 2 (K - 1) / K vectors."""
    return num_steps * 2 * (num_slots - 1) / num_slots * 2 * num_parameters


def read_rows(path: Path) -> list[Row]:
    """Finished rows; a last line that was cut off is not one."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{path}: left out a line that is no row", file=sys.stderr)
    return rows


def run_suite(
    paths: Sequence[Path], methods: Sequence[str], seeds: Sequence[int], plan: Plan, output: Path
) -> list[Row]:
    """Run what `output` does not have yet, appending each row as it ends. All rows asked for."""
    torch.set_num_threads(1)
    corpus = Corpus.of(paths, plan.num_windows)
    say, wanted = progress(), []
    made_by = environment(["torch", "numpy"])  # before it runs: the tree may move on meanwhile
    about = {
        "bench": "convergence",
        "suite": "full",
        "text": [f"{path.parent.name}/{path.name}" for path in paths],
        "text_bytes": sum(path.stat().st_size for path in paths),
        "num_slots": NUM_SLOTS,
    }
    for seed, method in product(seeds, methods):
        sync = parse_sync(method)
        key = {**about, "method": method, "sync": str(sync), "seed": seed, "plan": asdict(plan)}
        done = [r for r in read_rows(output) if all(r[name] == key[name] for name in _KEY)]
        if not done:
            row = run(method, sync, corpus, plan, seed, say)
            line = json.dumps({**about, **_with_ratio(row.as_dict(), plan), **made_by})
            _append(output, line)
            print(line, flush=True)
            done = [json.loads(line)]
        wanted.append(done[-1])
    return wanted


def _append(output: Path, line: str) -> None:
    """After whatever an interrupted run has left there."""
    is_cut = output.exists() and output.read_bytes()[-1:] not in (b"", b"\n")
    with output.open("a", encoding="utf-8") as file:
        file.write("\n" * is_cut + line + "\n")


def _with_ratio(row: Row, plan: Plan) -> Row:
    """The row, and how many times less than bf16 all-reduce it sends and receives."""
    num_parameters, up, down = row["num_parameters"], row["up_bytes"], row["down_bytes"]
    base = bf16_all_reduce_bytes(num_parameters, NUM_SLOTS, plan.num_steps)
    return {
        **row,
        "bf16_all_reduce_up_bytes": base,
        "up_ratio": base / up,
        "total_ratio": 2 * base / (up + down),
    }


def broken_claims(rows: Iterable[Row]) -> list[str]:
    """What the acceptance asks for and the rows do not show, or were not run for.

    Gaps are paired on the seed; what counts is `_upper` of them.
    """
    by_method: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_method.setdefault(str(row["method"]), {})[row["seed"]] = row
    missing = [name for name in SUITE if name not in by_method]
    if missing:
        return [f"{name} was not run" for name in missing]

    def gap(method: str, base: str) -> float:
        seeds = sorted(set(by_method[method]) & set(by_method[base]))
        return _upper(
            [by_method[method][s]["held_out"] - by_method[base][s]["held_out"] for s in seeds]
        )

    def ratio(method: str) -> float:
        return min(row["up_ratio"] for row in by_method[method].values())

    claims = {
        "cocktail sends at least 80 times less": ratio("cocktail") >= 80,
        "cocktail is within 0.05 of all-reduce": gap("cocktail", BASE) <= 0.05,
        "sparseloco sends at least 1000 times less": ratio("sparseloco") >= 1000,
        "sparseloco is within 0.10 of all-reduce": gap("sparseloco", BASE) <= 0.10,
        "sparseloco is within 0.03 of diloco": gap("sparseloco", "diloco") <= 0.03,
    }
    return [claim for claim, holds in claims.items() if not holds]


def _upper(gaps: Sequence[float]) -> float:
    """The upper end of their 95 % interval; of fewer than three the largest."""
    if len(gaps) < 3:
        return max(gaps)
    return mean(gaps) + float(t.ppf(0.975, len(gaps) - 1)) * stdev(gaps) / len(gaps) ** 0.5


def print_table(rows: Sequence[Row]) -> None:
    """As Markdown, against the base of the same seed."""
    base = {row["seed"]: row["held_out"] for row in rows if row["method"] == BASE}
    print(
        "| method | H | seed | held out | gap | of slot 0 | up, MB | down, MB | up ratio | CPU s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        loss, seed = row["held_out"], row["seed"]
        gap = f"{loss - base[seed]:+.4f}" if seed in base else ""
        seconds = row["compute_cpu_s"] + row["sync_cpu_s"]
        print(
            f"| `{row['method']}` | {parse_sync(str(row['sync'])).every} | {seed} | {loss:.4f} "
            f"| {gap} | {row['of_slot_0']:.4f} | {row['up_bytes'] / 1e6:.2f} "
            f"| {row['down_bytes'] / 1e6:.2f} | {row['up_ratio']:.1f} "
            f"| {seconds:.0f} |"
        )


def main(
    paths: Sequence[Path],
    methods: Sequence[str],
    seeds: Sequence[int],
    plan: Plan,
    output: Path,
    picture: Path | None,
) -> int:
    """1 if a claim does not hold; 0 without a text, which says that nothing was run."""
    if not paths:
        print("full suite skipped: it needs --text FILE [FILE ...]", file=sys.stderr)
        return 0
    rows = run_suite(paths, methods or SUITE, seeds, plan, output)
    print_table(rows)
    if picture is not None:
        draw(rows, picture)
    broken = broken_claims(rows)
    print(json.dumps({"bench": "convergence", "suite": "full", "broken": broken}))
    return 1 if broken else 0
