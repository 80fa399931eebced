"""The verbs that talk to a running node, and how their answers are printed."""

import json
import sys
import tomllib
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console, RenderableType

from swarmnode.cli import show
from swarmnode.cli.client import NodeClient
from swarmnode.cli.display import Display
from swarmnode.errors import CapacityError
from swarmnode.http.api import JobView


def submit(client: NodeClient, job_file: Path, as_json: bool) -> None:
    """Check a job file here, so that errors name it, and give it to the node."""
    from swarmnode.manifest import load_job_file

    load_job_file(job_file)
    raw = tomllib.loads(job_file.read_text(encoding="utf-8"))
    with Console(stderr=True).status("reading and tokenizing the data ..."):
        job, notes = client.submit_with_notes(raw, job_file.resolve().parent)
    for note in notes:
        print(f"swarmnode: note: {show.printable(note)}", file=sys.stderr)
    _answer(
        {"job": job, "notes": notes},
        as_json,
        f"job {job} is submitted; follow it with `swarmnode watch`",
    )


def jobs(client: NodeClient, as_json: bool) -> None:
    views = client.jobs()
    if as_json:
        _json([_plain(view) for view in views])
    elif views:
        _print(show.jobs_table(views))
    else:
        print("no jobs yet; start one with `swarmnode submit JOB.toml`")


def watch(client: NodeClient, job: str, as_json: bool) -> int:
    """Follow a job; the exit status: 1 if it failed."""
    view: JobView | None = None
    if as_json:
        for each in client.watch(job):
            if each != view:
                _json(_plain(each))
            view = each
    else:
        with Display(Console(), f"job {job}") as display:
            for view in client.watch(job):
                display.show(view)
    return 1 if view is not None and view.phase == "failed" else 0


def export(client: NodeClient, job: str, directory: Path, as_json: bool) -> None:
    with Console(stderr=True).status("collecting the weights ..."):
        step = client.export(job, directory)
    answer = {"step": step, "directory": str(directory.absolute())}
    _answer(answer, as_json, f"weights after {step} steps are in {directory}")


def generate(
    client: NodeClient, job: str, prompt: str, max_tokens: int, temperature: float,
    seed: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Print pieces as they come; with JSON, the whole text at the end."""
    view = client.job(job)
    if view.phase != "serving":
        raise CapacityError(
            f"job {view.job} is {view.phase} and answers when it serves; follow it with "
            f"`swarmnode watch {view.job}`"
        )
    pieces = client.generate(
        view.job, prompt, max_tokens=max_tokens, temperature=temperature, seed=seed
    )
    if as_json:
        _json({"job": view.job, "prompt": prompt, "text": "".join(pieces)})
        return
    for piece in pieces:
        sys.stdout.write(show.printable(piece))
        sys.stdout.flush()
    print()


def stop(client: NodeClient, job: str, as_json: bool) -> None:
    view = client.stop(job)
    if as_json:
        _json(_plain(view))
    else:
        print(f"job {view.job} is {view.phase} after {view.step} steps")


def status(client: NodeClient, as_json: bool) -> None:
    view = client.node()
    _json(asdict(view)) if as_json else _print(show.node_table(view, client.page))


def finish(client: NodeClient, as_json: bool) -> int:
    """Wait until the node is gone; the exit status: 1 if it ended with slots of its own."""
    view = client.finish()
    with Console(stderr=True).status("giving the work to others ..."):
        client.wait_gone(view)
    departure = client.departure(view)
    answer = {"peer": view.peer, **asdict(departure)}
    del answer["pid"]
    _answer(answer, as_json, show.departure_line(departure))
    return 1 if departure.kept else 0


def peers(client: NodeClient, as_json: bool) -> None:
    views = client.peers()
    _json([asdict(view) for view in views]) if as_json else _print(show.peers_table(views))


def _plain(view: JobView) -> dict[str, object]:
    plain = asdict(replace(view, losses=()))
    del plain["losses"]
    return plain


def _answer(answer: dict[str, object], as_json: bool, text: str) -> None:
    if as_json:
        _json(answer)
    else:
        print(text)


def _json(value: object) -> None:
    print(json.dumps(value), flush=True)


def _print(renderable: RenderableType) -> None:
    """A table; a pipe gets it as wide as it wants to be."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    console.print(renderable)
