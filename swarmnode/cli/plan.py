"""`swarmnode plan`: reads the files, gives the solver its time, and prints what came out."""

import asyncio
import json
import math
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from swarmnode.coordinator.objective import Effort
from swarmnode.coordinator.planning import DEFAULT_HORIZON_STEPS, Problem, Wanted, build
from swarmnode.coordinator.planning.inputs import (
    PRESETS,
    EarlierPlan,
    kv_share,
    llama_facts,
    read_gone,
    read_plan,
)
from swarmnode.coordinator.solver.search import Solution, solve
from swarmnode.domain import ModelFacts
from swarmnode.errors import CapacityError, ChildError, DataError
from swarmnode.manifest import JobFile, load_job_file

MAX_FILE_BYTES = 64 << 20
QUIET_S = 2.0
"""A search that takes longer than this shows a bar."""
REPAIR_MOVES = 10_000_000
DEFAULT_MODEL = {"training": "llama-1b", "serving": "llama-7b"}


@dataclass(frozen=True)
class PlanOptions:
    """The options of the verb as they were typed."""

    network: Path
    objective: str
    stages: int | None = None
    slots: int | None = None
    model: str | None = None
    nodes: Path | None = None
    job: Path | None = None
    previous: Path | None = None
    gone: str = ""
    horizon: float = DEFAULT_HORIZON_STEPS
    most_moved: int | None = None
    pins: tuple[str, ...] = ()
    max_hops: int | None = None
    max_latency_s: float | None = None
    latency_weight: float = 0.0
    partial: bool = False
    context: int | None = None
    rows: int | None = None
    sequence: int | None = None
    microbatches: int | None = None
    gradient_bytes: float | None = None
    activation_bytes: float | None = None
    seed: int = 0
    moves: int | None = None
    seconds: float | None = None
    explain: bool = False
    draw: Path | None = None


@dataclass(frozen=True)
class Planned:
    """A solved problem, and how the solving went."""

    problem: Problem
    solution: Solution
    cpu_s: float
    reasons: tuple[str, ...]


def run_plan(options: PlanOptions, as_json: bool) -> int:
    """Solve and print; returns the exit status. Raises: UserError with one line."""
    wanted = _wanted(options)
    planned = _solve(options, wanted)
    if options.draw is not None:
        _draw(planned, options.draw)
    if as_json:
        print(json.dumps(plan_json(planned), allow_nan=False))
        return 0
    from swarmnode.cli.plan_show import show_plan

    show_plan(planned)
    if options.draw is not None:
        print(f"drawn in {options.draw}")
    return 0


def read_json(path: Path, what: str) -> Any:
    """The JSON in a file of at most MAX_FILE_BYTES. Raises: DataError with one line."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{what} {str(path)!r:.200}: {reason}; check the path") from None
    if len(content) > MAX_FILE_BYTES:
        raise DataError(f"{what} {path} is over {MAX_FILE_BYTES >> 20} MiB")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} {path} is not JSON: {error!s:.200}") from None


def _object(path: Path, what: str) -> Mapping[str, Any]:
    raw = read_json(path, what)
    if not isinstance(raw, dict):
        raise DataError(f"{what} {path} is not a JSON object")
    return raw


def _nodes(path: Path | None) -> Any:
    """The JSON of a nodes file; None only without one."""
    raw = read_json(path, "nodes file") if path is not None else None
    if path is not None and raw is None:
        raise DataError(f"nodes file {path} is null; give a list of objects")
    return raw


def _wanted(options: PlanOptions) -> Wanted:
    network = _object(options.network, "network file")
    job = load_job_file(options.job) if options.job is not None else None
    earlier = _earlier(options)
    needs_model = options.objective == "training" or (
        options.objective == "serving" and "tokens_per_s_by_layers" not in network
    )
    config = _model_config(options, job) if needs_model else None
    batch = {
        "rows": options.rows,
        "sequence_length": options.sequence,
        "num_microbatches": options.microbatches,
    }
    return Wanted(
        objective=options.objective,
        network=network,
        nodes=_nodes(options.nodes),
        model=_facts(config) if config is not None else None,
        kv_share=kv_share(config) if config is not None else 1.0,
        job=job,
        batch={key: value for key, value in batch.items() if value is not None},
        stages=options.stages,
        slots=options.slots,
        pins=options.pins,
        earlier=earlier,
        gone=_gone(options.gone) | read_gone(network) | (earlier.gone if earlier else frozenset()),
        horizon_steps=_positive(options.horizon, "--horizon"),
        most_moved=options.most_moved,
        gradient_bytes=_positive(options.gradient_bytes, "--gradient-bytes"),
        activation_bytes=_positive(options.activation_bytes, "--activation-bytes"),
        max_hops=options.max_hops,
        max_latency_s=_positive(options.max_latency_s, "--max-latency"),
        latency_weight=options.latency_weight,
        partial=options.partial,
        **({} if options.context is None else {"context_tokens": options.context}),
    )


def _positive(value: Any, what: str) -> Any:
    """The value itself. Raises: DataError unless it is absent or a number above 0."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise DataError(f"{what} {value}: give a number above 0")
    return value


def _earlier(options: PlanOptions) -> EarlierPlan | None:
    if options.previous is None:
        return None
    return read_plan(_object(options.previous, "previous plan"))


def _gone(text: str) -> frozenset[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if not part.isdecimal() or len(part) > 9:
            raise DataError(f"--gone {part!r:.40}: give node indices, as in 3,7")
    return frozenset(int(part) for part in parts)


def _model_config(options: PlanOptions, job: JobFile | None) -> Mapping[str, Any]:
    """A preset, a config.json, or what the job file names."""
    if options.model is None and job is not None:
        source = job.model.config if job.model.config is not None else job.model.path
        return source if isinstance(source, dict) else _config(Path(str(source)))
    name = options.model or DEFAULT_MODEL[options.objective]
    return PRESETS[name] if name in PRESETS else _config(Path(name))


def _facts(config: Mapping[str, Any]) -> ModelFacts:
    """The sizes of a model."""
    facts = llama_facts(config)
    return facts if facts is not None else _asked_facts(config)


def _config(path: Path) -> Mapping[str, Any]:
    try:
        path = path.expanduser()
        is_folder = path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"model {str(path)!r:.80}: {error}") from None
    try:
        return _object(path / "config.json" if is_folder else path, "model config")
    except DataError as error:
        raise DataError(f"{error}; presets are {', '.join(PRESETS)}") from None


def _asked_facts(config: Mapping[str, Any]) -> ModelFacts:
    """Any other family: a child with torch builds the model without memory and counts."""
    from swarmnode.worker.models.tool import model_facts

    with tempfile.TemporaryDirectory(prefix="swarmnode-plan-") as folder:
        try:
            return asyncio.run(model_facts(config, Path(folder) / "model-tool.log", 1))
        except ChildError as error:
            raise DataError(f"the model's sizes could not be read: {error}") from None


def _solve(options: PlanOptions, wanted: Wanted) -> Planned:
    limit_s = _positive(options.seconds, "--seconds")
    began_s = time.process_time()
    with _interruptible() as stopped, _bar() as report:

        def should_stop() -> bool:
            return bool(stopped) or (
                limit_s is not None and time.process_time() - began_s >= limit_s
            )

        effort = Effort(_moves(options), options.seed, should_stop, report)
        problem = build(wanted, effort)
        solution = solve(problem.objective, previous=problem.previous, effort=effort)
    cpu_s = time.process_time() - began_s
    if not math.isfinite(solution.cost_s):
        raise CapacityError(
            "no arrangement was found that has a link wherever it needs one and keeps every limit; "
            "mend the network's missing or one-way links, or ask for fewer stages or slots"
        )
    reasons = [*problem.notes, *solution.reasons]
    if stopped:
        reasons.append("stopped by Ctrl-C: this is the best so far")
        print("swarmnode: stopped; this is the best so far", file=sys.stderr)
    elif limit_s is not None and cpu_s >= limit_s:
        reasons.append(f"stopped after {limit_s:g} s of processor time")
    if options.explain:
        reasons += problem.objective.explain(solution.arrangement)
    return Planned(problem, solution, cpu_s, tuple(reasons))


def _moves(options: PlanOptions) -> int:
    """As asked for; a repair of a grid of one slot each is worth more of its cheap moves."""
    if options.moves is not None:
        return options.moves
    is_repair = options.previous is not None and options.objective == "dtfm"
    return REPAIR_MOVES if is_repair else Effort().moves


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """The first Ctrl-C only fills the list; the second one ends the program."""
    stopped: list[int] = []

    def interrupt(number: int, _frame: object) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)

    try:
        before = signal.signal(signal.SIGINT, interrupt)
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        yield stopped
        return
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _bar() -> Iterator[Any]:
    """A progress bar on stderr that appears after QUIET_S, in a terminal only."""
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("searching"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %  best {task.fields[best]}"),
        console=console,
        transient=True,
    )
    task = progress.add_task("search", total=1.0, best="-")
    began_s, is_shown = time.monotonic(), False

    def report(share: float, best: float) -> None:
        nonlocal is_shown
        progress.update(task, completed=min(1.0, share), best=f"{best:.5g}")
        if not is_shown and console.is_terminal and time.monotonic() - began_s > QUIET_S:
            is_shown = True
            progress.start()

    try:
        yield report
    finally:
        if is_shown:
            progress.stop()


def plan_json(planned: Planned) -> dict[str, Any]:
    """The one object that `--json` prints; node numbers are those of the network file."""
    solution, nodes = planned.solution, planned.problem.nodes
    arrangement = solution.arrangement
    return {
        "objective": solution.objective,
        "cost": solution.cost_s,
        "parts": {name: _finite(value) for name, value in solution.parts.items()},
        "bound": _finite(solution.bound.seconds) if solution.bound else None,
        "gap": _finite(solution.gap),
        "optimal": solution.is_optimal,
        "assignment": [[nodes[node] for node in row] for row in arrangement.slots],
        "layers": [list(pair) for pair in arrangement.layers],
        "seconds": round(planned.cpu_s, 4),
        "moves_done": solution.moves_done,
        "seed": solution.seed,
        "reasons": list(planned.reasons),
        "moved": [nodes[node] for node in solution.moved],
    }


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _draw(planned: Planned, path: Path) -> None:
    from swarmnode.cli.plan_drawing import draw
    from swarmnode.cli.plan_show import picture_of

    try:
        path.write_text(draw(picture_of(planned)), encoding="utf-8")
    except OSError as error:
        raise DataError(f"--draw {path}: {error.strerror}; choose another file") from None
