"""`swarmnode simulate`: runs a scenario over seeds, and says what happened in it."""

import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from swarmnode.errors import DataError
from swarmnode.simulation.outcome import JobOutcome, Outcome, run_seed
from swarmnode.simulation.scenario import Scenario, load_scenario
from swarmnode.simulation.statistics import percentile

TRACE_LINES = 60
"""Of the end of a run, with --trace."""
MOST_SHOWN = 10
"""Violations that are printed one by one."""


@dataclass(frozen=True)
class SimulateOptions:
    """What the command line says."""

    scenario: Path
    seed: int | None
    seeds: str | None
    """`A..B`, half open."""
    jobs: int
    trace: bool


def run_simulate(options: SimulateOptions, as_json: bool) -> int:
    """Run all seeds; the exit status: 1 if something happened that never may."""
    scenario = load_scenario(options.scenario)
    seeds = _seeds(options)
    console = Console(stderr=True)
    outcomes: list[Outcome] = []
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    ) as progress:  # fmt: skip
        if len(seeds) == 1:
            total = int(scenario.duration_s or 0)
            task = progress.add_task("virtual seconds", total=total or None)
            outcomes.append(
                run_seed(
                    scenario,
                    seeds[0],
                    keep_trace=options.trace,
                    on_time=lambda now_s: progress.update(task, completed=int(now_s)),
                )
            )
        else:
            task = progress.add_task("seeds", total=len(seeds))
            for outcome in _run_all(scenario, seeds, options.jobs):
                outcomes.append(outcome)
                progress.advance(task)
    outcomes.sort(key=lambda outcome: outcome.seed)
    if as_json:
        print(json.dumps(_summary(scenario, outcomes)))
    else:
        _show(scenario, outcomes)
    bad = [outcome for outcome in outcomes if outcome.violation]
    for outcome in bad[:MOST_SHOWN]:
        replay = f"swarmnode simulate {options.scenario} --seed {outcome.seed} --trace"
        print(f"violation: {outcome.violation}\n  replay: {replay}", file=sys.stderr)
    if options.trace:
        for outcome in outcomes[:1]:
            print("\n".join(outcome.trace[-TRACE_LINES:]), file=sys.stderr)
    return 1 if bad else 0


def _seeds(options: SimulateOptions) -> range:
    if options.seeds is None:
        first = options.seed or 0
        return range(first, first + 1)
    start, dots, stop = options.seeds.partition("..")
    if not (dots and start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise DataError(f"--seeds {options.seeds}: give a half-open range such as 0..1000")
    return range(int(start), int(stop))


def _run_all(scenario: Scenario, seeds: range, num_jobs: int) -> Iterator[Outcome]:
    if num_jobs == 1:
        for seed in seeds:
            yield run_seed(scenario, seed)
        return
    with multiprocessing.get_context("fork").Pool(num_jobs) as pool:
        yield from pool.imap_unordered(_Run(scenario), seeds, chunksize=8)


@dataclass(frozen=True)
class _Run:
    """What a worker process is given."""

    scenario: Scenario

    def __call__(self, seed: int) -> Outcome:
        return run_seed(self.scenario, seed)


def _summary(scenario: Scenario, outcomes: list[Outcome]) -> dict[str, object]:
    return {
        "scenario": scenario.name,
        "seeds": len(outcomes),
        "violations": [{"seed": o.seed, "what": o.violation} for o in outcomes if o.violation],
        "virtual_s": sum(outcome.virtual_s for outcome in outcomes),
        "events": sum(outcome.events for outcome in outcomes),
        "messages": sum(outcome.messages for outcome in outcomes),
        "checks": sum(outcome.checks for outcome in outcomes),
        "recoveries": _recoveries([job for outcome in outcomes for job in outcome.jobs]),
        "jobs": [asdict(job) for job in outcomes[0].jobs] if len(outcomes) == 1 else [],
    }


def _recoveries(jobs: list[JobOutcome]) -> dict[str, dict[str, float]]:
    """By kind of fault: how many, and how long; and how many of them are still open at the end."""
    by_kind: dict[str, list[float]] = {}
    num_open = Counter(kind for job in jobs for kind, _ in job.open_hits)
    for job in jobs:
        for kind, seconds in job.recoveries:
            by_kind.setdefault(kind, []).append(seconds)
    rows: dict[str, dict[str, float]] = {}
    for kind in sorted({*by_kind, *num_open}):
        found = by_kind.get(kind, [])
        rows[kind] = {"count": len(found), "open": num_open[kind]}
        if found:
            rows[kind] |= {
                "p50_s": percentile(found, 0.5),
                "p95_s": percentile(found, 0.95),
                "max_s": max(found),
            }
    return rows


def _show(scenario: Scenario, outcomes: list[Outcome]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    num_bad = sum(bool(outcome.violation) for outcome in outcomes)
    virtual_h = sum(outcome.virtual_s for outcome in outcomes) / 3600
    events = sum(outcome.events for outcome in outcomes)
    checks = sum(outcome.checks for outcome in outcomes)
    console.print(
        f"{scenario.name}: {len(outcomes)} seeds, {virtual_h:,.1f} virtual hours, "
        f"{events:,} events, {checks:,} checks, {num_bad} violations"
    )
    if len(outcomes) == 1:
        console.print(_jobs_table(outcomes[0].jobs))
    recoveries = _recoveries([job for outcome in outcomes for job in outcome.jobs])
    if recoveries:
        console.print(_recoveries_table(recoveries))


def _jobs_table(jobs: tuple[JobOutcome, ...]) -> Table:
    table = Table("job", "steps", "generations", "takeovers", "step", "goodput")
    for job in jobs:
        step = f"{job.step_s:.1f} s" if job.step_s is not None else "-"
        goodput = f"{100 * job.goodput:.1f} %" if job.goodput is not None else "-"
        steps = f"{job.steps} of {job.wanted}"
        table.add_row(job.name, steps, str(job.generations), str(job.takeovers), step, goodput)
    return table


def _recoveries_table(recoveries: dict[str, dict[str, float]]) -> Table:
    table = Table("after", "recoveries", "open", "p50", "p95", "longest")
    for kind, found in recoveries.items():
        names = ("p50_s", "p95_s", "max_s")
        spans = [f"{found[name]:.1f} s" if name in found else "-" for name in names]
        table.add_row(kind, str(int(found["count"])), str(int(found["open"])), *spans)
    return table
