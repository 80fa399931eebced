"""The command `swarmnode`: what can be asked of a node. Heavy imports wait until they are needed.

Exit status: 0 done, 1 failed, 2 the user can mend it, 130 interrupted.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarmnode import __version__
from swarmnode.cli.bench import bench_app
from swarmnode.cli.offline import AsJson, plan, simulate
from swarmnode.config import NodeConfig, default_home, load_config
from swarmnode.errors import SwarmError, UserError

if TYPE_CHECKING:
    from swarmnode.cli.client import NodeClient

app = typer.Typer(
    help="Train and serve large language models on a swarm of home GPUs.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _field(name: str, *flags: str) -> Any:
    """An option whose help text is the config field's own."""
    return typer.Option(*flags, help=NodeConfig.model_fields[name].description)


Home = Annotated[
    Path | None,
    typer.Option("--home", help="The node's folder; SWARMNODE_HOME or the user's data folder."),
]
Job = Annotated[str, typer.Argument(help="Id of a job, the beginning of it, or a name.")]

checkpoint_app = typer.Typer(
    help="List, check and export checkpoints.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(bench_app, name="bench")
Place = Annotated[
    str,
    typer.Argument(metavar="JOB|DIR", help="A job of this node; or a folder, without a node."),
]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:  # pragma: no cover - click shows the help
        raise typer.Exit(2)


@app.command()
def up(
    home: Home = None,
    join: Annotated[list[str] | None, _field("join", "--join")] = None,
    host: Annotated[str | None, _field("listen_host", "--host")] = None,
    announce_host: Annotated[str | None, _field("announce_host", "--announce-host")] = None,
    transport_port: Annotated[int | None, _field("transport_port", "--transport-port")] = None,
    directory_port: Annotated[int | None, _field("directory_port", "--directory-port")] = None,
    http_port: Annotated[int | None, _field("http_port", "--http-port")] = None,
    memory: Annotated[str | None, _field("memory_bytes", "--memory")] = None,
    threads: Annotated[int | None, _field("num_threads", "--threads")] = None,
    upload_mbit: Annotated[float | None, _field("upload_mbit", "--upload-mbit")] = None,
    targets: Annotated[Path | None, _field("targets_directory", "--targets")] = None,
    device: Annotated[str | None, _field("device", "--device")] = None,
    lease: Annotated[float | None, _field("lease_s", "--lease")] = None,
    log_level: Annotated[str | None, _field("log_level", "--log-level")] = None,
) -> None:
    """Run a node in the foreground, until Ctrl-C."""
    config = load_config(
        home,
        join=tuple(join) if join else None,
        listen_host=host,
        announce_host=announce_host,
        transport_port=transport_port,
        directory_port=directory_port,
        http_port=http_port,
        memory_bytes=memory,
        num_threads=threads,
        upload_mbit=upload_mbit,
        targets_directory=targets,
        device=device,
        lease_s=lease,
        log_level=log_level,
    )
    from swarmnode.cli.foreground import run_node

    raise typer.Exit(run_node(config))


@app.command()
def submit(
    job_file: Annotated[Path, typer.Argument(metavar="JOB.toml", help="See docs/job-files.md.")],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Start a job on this node and print its id."""
    from swarmnode.cli import verbs

    with _client(home) as client:
        verbs.submit(client, job_file, as_json)


@app.command()
def jobs(home: Home = None, as_json: AsJson = False) -> None:
    """List the jobs that this node coordinates."""
    from swarmnode.cli import verbs

    with _client(home) as client:
        verbs.jobs(client, as_json)


@app.command()
def watch(job: Job, home: Home = None, as_json: AsJson = False) -> None:
    """Follow a job until it serves, failed or stopped; with --json one line for each change."""
    from swarmnode.cli import verbs

    with _client(home) as client:
        raise typer.Exit(verbs.watch(client, job, as_json))


@app.command()
def export(
    job: Job,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Write a job's weights and tokenizer as an ordinary Hugging Face folder."""
    from swarmnode.cli import verbs

    with _client(home) as client:
        verbs.export(client, job, directory, as_json)


@checkpoint_app.command("list")
def checkpoint_list(place: Place, home: Home = None, as_json: AsJson = False) -> None:
    """List the checkpoints that are kept, with the hash over their weights."""
    from swarmnode.cli import checkpoint_verbs

    checkpoint_verbs.list_checkpoints(lambda: _client(home), place, as_json)


@checkpoint_app.command("verify")
def checkpoint_verify(place: Place, home: Home = None, as_json: AsJson = False) -> None:
    """Check signatures, and every byte against its hash; one line for each damage."""
    from swarmnode.cli import checkpoint_verbs

    raise typer.Exit(checkpoint_verbs.verify(lambda: _client(home), place, as_json))


@checkpoint_app.command("export")
def checkpoint_export(
    place: Place,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    step: Annotated[int | None, typer.Option(min=0, help="The newest unless given.")] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Write weights, optimizer state and tokenizer as a folder to resume from."""
    from swarmnode.cli import checkpoint_verbs

    checkpoint_verbs.export(lambda: _client(home), place, directory, step, as_json)


@app.command()
def generate(
    job: Job,
    prompt: Annotated[str, typer.Argument(help="Text that the model goes on from.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to make.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy.")] = 0.8,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Print what a served model says, as the swarm makes it."""
    from swarmnode.cli import verbs

    with _client(home) as client:
        verbs.generate(client, job, prompt, max_tokens, temperature, seed, as_json)


@app.command()
def stop(job: Job, home: Home = None, as_json: AsJson = False) -> None:
    """End a job and release its workers; its checkpoints stay."""
    from swarmnode.cli import verbs

    with _client(home) as client:
        verbs.stop(client, job, as_json)


@app.command()
def status(home: Home = None, as_json: AsJson = False) -> None:
    """Show this node."""
    from swarmnode.cli import verbs

    with _client(home) as client:
        verbs.status(client, as_json)


@app.command()
def finish(home: Home = None, as_json: AsJson = False) -> None:
    """Give this node's work to others, then end it; fails if it ended with slots of its own."""
    from swarmnode.cli import verbs

    with _client(home) as client:
        status = verbs.finish(client, as_json)
    raise typer.Exit(status)


@app.command()
def peers(home: Home = None, as_json: AsJson = False) -> None:
    """List the peers that this node knows."""
    from swarmnode.cli import verbs

    with _client(home) as client:
        verbs.peers(client, as_json)


@app.command()
def demo(
    data: Annotated[
        Path | None,
        typer.Option(help="Text to train on; Python's own sources unless given."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=3, help="Optimizer steps.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, samples and texts.")] = 0,
    keep: Annotated[Path | None, typer.Option(help="Keep homes and export in this folder.")] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Same seed, same weights, bit for bit.")
    ] = False,
    kill: Annotated[
        int, typer.Option(metavar="N", min=0, max=100, help="SIGKILLs on the way; 1: a worker.")
    ] = 1,
    kill_seed: Annotated[
        int | None, typer.Option(min=0, help="Draws victims and moments; 0 if N > 1.")
    ] = None,
    no_kill: Annotated[bool, typer.Option("--no-kill", help="The same as --kill 0.")] = False,
    prometheus_targets: Annotated[
        Path | None, typer.Option(help="Folder for Prometheus's target files.")
    ] = None,
    stay: Annotated[
        bool, typer.Option("--stay", help="Keep serving in the end, until Ctrl-C.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train, lose a node, go on, export and serve: a whole swarm on this machine."""
    from swarmnode.cli.demo import DEFAULT_STEPS, Wanted, run_demo

    wanted = Wanted(
        data=data,
        steps=steps or DEFAULT_STEPS,
        seed=seed,
        keep=keep,
        num_kills=0 if no_kill else kill,
        kill_seed=kill_seed,
        deterministic=deterministic,
        prometheus_targets=prometheus_targets,
        stay=stay,
    )
    raise typer.Exit(run_demo(wanted, as_json))


app.command()(plan)
app.command()(simulate)


def _client(home: Path | None) -> "NodeClient":
    from swarmnode.cli.client import NodeClient

    return NodeClient.of_home((home or default_home()).expanduser().absolute())


def main() -> None:
    """Run the command line; whatever the world did wrong is one line on stderr."""
    try:
        app()
    except SwarmError as error:
        kind = "" if isinstance(error, UserError) else "failed: "
        print(f"swarmnode: {kind}{' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
