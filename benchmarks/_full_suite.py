"""The full convergence suite: which rows, where they are kept, what they must show."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
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
_KEY = ("method", "sync", "seed", "plan", "text", "text_bytes", "device")


def bf16_all_reduce_bytes(num_parameters: int, num_slots: int, num_steps: int) -> float:
    """What each slot sends if gradients are summed as bf16 every step: 2 (K - 1) / K vectors."""
    return num_steps * 2 * (num_slots - 1) / num_slots * 2 * num_parameters


def read_rows(path: Path) -> list[Row]:
    """Finished rows; a last line that was cut off is not one. Those that name no device are of a
    time when there was only the CPU."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append({"device": "cpu", **json.loads(line)})
        except json.JSONDecodeError:
            print(f"{path}: left out a line that is no row", file=sys.stderr)
    return rows


def run_suite(
    paths: Sequence[Path],
    methods: Sequence[str],
    seeds: Sequence[int],
    plan: Plan,
    output: Path,
    device: str,
) -> list[Row]:
    """Run what `output` does not have yet, appending each row as it ends. All rows asked for."""
    torch.set_num_threads(1)
    corpus = Corpus.of(paths, plan.num_windows).to(device)
    say, wanted = progress(), []
    made_by = environment(["torch", "numpy"])  # before it runs: the tree may move on meanwhile
    about = {
        "bench": "convergence",
        "suite": "full",
        "text": [f"{path.parent.name}/{path.name}" for path in paths],
        "text_bytes": sum(path.stat().st_size for path in paths),
        "num_slots": NUM_SLOTS,
        "device": device,
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


def comparable(rows: Iterable[Row], row: Row) -> list[Row]:
    """Those of the same text, size, batch, steps and device: methods, rates and seeds differ."""

    def about(each: Row) -> list[Any]:
        plan = {name: value for name, value in each["plan"].items() if name != "rate"}
        return [each["text"], each["text_bytes"], plan, each["device"]]

    return [each for each in rows if about(each) == about(row)]


def _family(row: Row) -> str | None:
    """The preset of the acceptance that a row is of, tuned or not; None for any other.

    The acceptance names SparseLoCo's codec and H, and DiLoCo has the same H.
    """
    family, sync = str(row["method"]).split(",")[0], parse_sync(str(row["sync"]))
    is_named = {
        "sparseloco": (sync.codec, sync.every) == ("topk64of4096/int2", 30),
        "diloco": sync.every == 30,
    }
    return family if family in SUITE and is_named.get(family, True) else None


def taken(rows: Iterable[Row]) -> dict[str, dict[int, Row]]:
    """By family and seed, the rows that stand for it: its best method and rate.

    Best is the lowest mean held-out loss over the seeds that all families have; who has not all
    of those is not looked at. The choice is by the loss that is compared, all-reduce's too.
    """
    tried: dict[str, dict[tuple[str, float], dict[int, Row]]] = {name: {} for name in SUITE}
    for row in rows:
        if (family := _family(row)) is not None:
            key = str(row["sync"]), float(row["plan"]["rate"])
            tried[family].setdefault(key, {})[row["seed"]] = row
    seeds_of = [{seed for found in each.values() for seed in found} for each in tried.values()]
    seeds = sorted(set.intersection(*[each for each in seeds_of if each] or [set()]))
    best = {}
    for family, each in tried.items():
        whole = [
            {s: found[s] for s in seeds} for found in each.values() if set(seeds) <= set(found)
        ]
        if seeds and whole:
            best[family] = min(whole, key=lambda f: mean(row["held_out"] for row in f.values()))
    return best


def broken_claims(best: Mapping[str, Mapping[int, Row]]) -> list[str]:
    """What the acceptance asks for and the rows `taken` do not show, or were not run for.

    Gaps are paired on the seed; what counts is `_upper` of them.
    """
    missing = [name for name in SUITE if name not in best]
    if missing:
        return [f"{name} was not run" for name in missing]

    def gap(method: str, base: str) -> float:
        pairs = [(row, best[base][seed]) for seed, row in best[method].items()]
        return _upper([row["held_out"] - other["held_out"] for row, other in pairs])

    def ratio(method: str) -> float:
        return min(row["up_ratio"] for row in best[method].values())

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


def print_taken(best: Mapping[str, Mapping[int, Row]]) -> None:
    """Which rows the claims are about, and how far each is from all-reduce's."""
    print("\nTaken for the claims, of all rows that are kept: the best of each, at any rate.\n")
    print("| family | method | rate | seeds | held out | gap |")
    print("|---|---|---|---|---|---|")
    for family, by_seed in best.items():
        row, seeds = next(iter(by_seed.values())), ", ".join(map(str, by_seed))
        loss = mean(each["held_out"] for each in by_seed.values())
        gap = ""
        if BASE in best:
            gap = f"{loss - mean(each['held_out'] for each in best[BASE].values()):+.4f}"
        print(
            f"| {family} | `{row['method']}` | {row['plan']['rate']:g} | {seeds} "
            f"| {loss:.4f} | {gap} |"
        )
    print()


def main(
    paths: Sequence[Path],
    methods: Sequence[str],
    seeds: Sequence[int],
    plan: Plan,
    output: Path,
    picture: Path | None,
    device: str,
) -> int:
    """1 if a claim does not hold; 0 without a text, which says that nothing was run."""
    if not paths:
        print("full suite skipped: it needs --text FILE [FILE ...]", file=sys.stderr)
        return 0
    rows = run_suite(paths, methods or SUITE, seeds, plan, output, device)
    print_table(rows)
    if picture is not None:
        draw(rows, picture)
    best = taken(comparable(read_rows(output), rows[0]))
    print_taken(best)
    broken = broken_claims(best)
    print(json.dumps({"bench": "convergence", "suite": "full", "broken": broken}))
    return 1 if broken else 0
