"""The verbs that need no running node, and their options: plan, simulate."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


class PlanObjective(StrEnum):
    """What a plan makes small."""

    DTFM = "dtfm"
    TRAINING = "training"
    SERVING = "serving"


def plan(
    network: Annotated[
        Path,
        typer.Option(metavar="FILE.json", help="Links among the nodes; see docs/placement.md."),
    ],
    objective: Annotated[PlanObjective, typer.Option(help="What to make small.")],
    stages: Annotated[int | None, typer.Option(min=1, max=4096, help="Pipeline stages, S.")] = None,
    slots: Annotated[int | None, typer.Option(min=1, max=4096, help="Pipelines, V.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A config.json, its folder, or a preset such as llama-7b.")
    ] = None,
    nodes: Annotated[Path | None, typer.Option(help="JSON: what each machine can do.")] = None,
    job: Annotated[
        Path | None, typer.Option(metavar="JOB.toml", help="Model, batch, codecs and grid.")
    ] = None,
    previous: Annotated[
        Path | None, typer.Option(metavar="PLAN.json", help="An earlier --json answer to repair.")
    ] = None,
    gone: Annotated[str, typer.Option(metavar="3,7", help="Indices of dead nodes.")] = "",
    horizon: Annotated[
        float, typer.Option(metavar="STEPS", help="Steps to the next change: what a move may cost.")
    ] = 100.0,
    most_moved: Annotated[
        int | None, typer.Option(min=0, help="dtfm: most survivors that a repair may move.")
    ] = None,
    pin: Annotated[
        list[str] | None, typer.Option(metavar="NODE=STAGE", help="This stage or none; repeatable.")
    ] = None,
    max_hops: Annotated[
        int | None, typer.Option(min=1, help="Serving: most nodes in a chain.")
    ] = None,
    max_latency: Annotated[
        float | None, typer.Option(metavar="S", help="Serving: most seconds for a token.")
    ] = None,
    latency_weight: Annotated[
        float, typer.Option(min=0, help="Serving: seconds per token that 1 s of latency is worth.")
    ] = 0.0,
    partial: Annotated[
        bool, typer.Option("--partial/--whole", help="Serving: enter ranges in their middle.")
    ] = False,
    context: Annotated[
        int | None, typer.Option(min=1, max=1 << 24, help="Serving: tokens per sequence.")
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Training: rows of a microbatch.")] = None,
    sequence: Annotated[int | None, typer.Option(help="Training: tokens in a row.")] = None,
    microbatches: Annotated[int | None, typer.Option(help="Training: in a step.")] = None,
    gradient_bytes: Annotated[
        float | None, typer.Option(help="dtfm: of a stage; DT-FM's 0.65e9 unless given.")
    ] = None,
    activation_bytes: Annotated[
        float | None, typer.Option(help="dtfm: of a pipeline; DT-FM's 0.4712e9 unless given.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="Same seed, same plan.")] = 0,
    moves: Annotated[
        int | None, typer.Option(min=1, max=1 << 40, help="Arrangements to try.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(metavar="T", help="Most processor seconds to search.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say why, in words.")] = False,
    draw: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw the plan into this file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the best arrangement of a swarm, and say how good it is; needs no running node."""
    from swarmnode.cli.plan import PlanOptions, run_plan

    options = PlanOptions(
        network=network,
        objective=objective.value,
        stages=stages,
        slots=slots,
        model=model,
        nodes=nodes,
        job=job,
        previous=previous,
        gone=gone,
        horizon=horizon,
        most_moved=most_moved,
        pins=tuple(pin or ()),
        max_hops=max_hops,
        max_latency_s=max_latency,
        latency_weight=latency_weight,
        partial=partial,
        context=context,
        rows=rows,
        sequence=sequence,
        microbatches=microbatches,
        gradient_bytes=gradient_bytes,
        activation_bytes=activation_bytes,
        seed=seed,
        moves=moves,
        seconds=seconds,
        explain=explain,
        draw=draw,
    )
    raise typer.Exit(run_plan(options, as_json))


def simulate(
    scenario: Annotated[
        Path, typer.Argument(metavar="SCENARIO.toml", help="See docs/simulation.md.")
    ],
    seed: Annotated[int | None, typer.Option(min=0, help="Same seed, same run.")] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="A..B", help="Many runs, half open: 0..1000.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=256, help="Processes, for --seeds.")] = 1,
    trace: Annotated[bool, typer.Option("--trace", help="Print the end of the first run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a swarm on a virtual clock, with seeded faults; needs no running node."""
    from swarmnode.cli.simulate import SimulateOptions, run_simulate

    options = SimulateOptions(scenario, seed, seeds, jobs, trace)
    raise typer.Exit(run_simulate(options, as_json))
