"""`swarmnode demo`: a whole swarm on this machine trains, loses a node, goes on and answers."""

import contextlib
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from swarmnode.cli.client import NodeClient
from swarmnode.cli.demo_data import write_stdlib_sources
from swarmnode.cli.demo_kills import Killing, draw_kills, single_kill
from swarmnode.cli.demo_watch import JobWatch, Kill, Trial
from swarmnode.cli.display import Display
from swarmnode.cli.local_swarm import LocalSwarm
from swarmnode.cli.show import amount, figure, printable
from swarmnode.cli.weights_hash import weights_sha256
from swarmnode.errors import BusyError, DataError, SwarmError, UserError
from swarmnode.http.api import JobView
from swarmnode.presets import byte_llama_config

DEFAULT_STEPS = 360
NUM_NODES = 4
DATA_BYTES = 3 << 20
PROMPTS = ("def ", "import ", "class ")
SAMPLE_TOKENS = 160


@dataclass(frozen=True)
class Wanted:
    """What the command line asks of the demo."""

    data: Path | None
    steps: int
    seed: int
    keep: Path | None
    num_kills: int
    kill_seed: int | None
    """None: a single kill hits a worker at a third of the run, and it stays dead."""
    deterministic: bool
    prometheus_targets: Path | None
    stay: bool = False


@dataclass(frozen=True)
class Summary:
    """What `--json` prints at the end. Losses are nats per byte."""

    steps: int
    first_loss: float
    final_loss: float
    val_loss: float
    seconds: float
    """The whole demo, from the first process to the last one's end."""
    tokens_per_s: float
    """While training, the recovery included."""
    bytes_activation: int
    """Hidden states and their gradients, as sent."""
    bytes_gradient: int
    """Parameter gradients, shares and sums, as sent."""
    killed_peer: str | None
    """The first victim."""
    recovery_s: float | None
    """From that kill to the next step that the swarm committed in its new placement."""
    kills: tuple[Kill, ...]
    recovery_p50_s: float | None
    recovery_max_s: float | None
    weights_sha256: str
    """Over all weights of the export, see `weights_hash`."""
    generations: int
    export_dir: str | None
    """None unless the folder is kept."""
    endpoint: str
    samples: tuple[str, ...]


def run_demo(wanted: Wanted, as_json: bool) -> int:
    """Run the demo; the exit status. Raises: UserError, SwarmError, with nothing left running."""
    console = Console(stderr=as_json)
    with _root(wanted.keep) as root, _sigterm_interrupts():
        targets = wanted.prometheus_targets
        extra = ("--targets", str(targets.absolute())) if targets is not None else ()
        swarm = LocalSwarm(root, NUM_NODES, extra_args=extra)
        try:
            with swarm, Display(console, "swarmnode demo") as display:
                summary = _Demo(wanted, root, swarm, display).run()
        except UserError:
            raise
        except SwarmError:
            _print_logs(swarm)
            raise
        if left := swarm.pids():
            raise SwarmError(f"processes are left: {left}")
    if as_json:
        print(json.dumps(asdict(summary)), flush=True)
    else:
        _print_summary(console, summary)
    return 0


class _Demo:
    """One run: the phases in order, and what they found out."""

    def __init__(self, wanted: Wanted, root: Path, swarm: LocalSwarm, display: Display) -> None:
        self._wanted = wanted
        self._root = root
        self._swarm = swarm
        self._display = display
        self._started_s = time.monotonic()

    def run(self) -> Summary:
        display, client_of = self._display, self._swarm.node
        data = self._data()
        display.note(f"starting {NUM_NODES} nodes, each a daemon of its own")
        self._swarm.start()
        client = client_of(0).client
        display.note(f"all {NUM_NODES} see each other; the first one takes the job")
        job = client.submit(job_description(data, self._wanted), self._root)
        watch = JobWatch(self._swarm, job)
        trial = Trial(self._swarm, watch, self._killing(), display)
        view = trial.run()
        export = self._root / "export"
        display.note("exporting the weights as a Hugging Face folder")
        client = watch.client
        client.export(job, export)
        (self._root / "losses.json").write_text(json.dumps(client.losses(job)))
        display.note(f"the swarm serves at {client.address}/v1; three samples")
        samples = tuple(self._sample(client, job, number) for number in range(len(PROMPTS)))
        if self._wanted.stay:
            self._stay(client)
        client.stop(job)
        display.note("stopping everything")
        self._swarm.stop()
        return self._summary(view, trial, f"{client.address}/v1", samples, export)

    def _killing(self) -> Killing:
        wanted = self._wanted
        if wanted.num_kills == 1 and wanted.kill_seed is None:
            plan = single_kill(NUM_NODES)
        else:
            plan = draw_kills(wanted.num_kills, wanted.kill_seed or 0, NUM_NODES)
        return Killing(plan, NUM_NODES, wanted.steps)

    def _stay(self, client: NodeClient) -> None:
        """Keep serving until Ctrl-C."""
        self._display.note(f"page: {client.page}")
        self._display.note(f"model `demo` at {client.address}/v1, any OpenAI client; Ctrl-C ends")
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                self._swarm.check()
                time.sleep(0.5)

    def _data(self) -> Path:
        if self._wanted.data is not None:
            path = self._wanted.data.expanduser().absolute()
            if not path.exists():  # the node would say so too, but only once there is one
                raise DataError(f"{path}: no such file or folder; give text with --data PATH")
            return path
        folder = self._root / "data"
        num_files = write_stdlib_sources(folder, DATA_BYTES, self._wanted.seed)
        self._display.note(f"data: {num_files} source files of Python's standard library")
        return folder

    def _sample(self, client: NodeClient, job: str, number: int) -> str:
        prompt = PROMPTS[number]
        pieces = client.generate(
            job, prompt, max_tokens=SAMPLE_TOKENS, temperature=0.8, seed=self._wanted.seed + number
        )
        return printable(prompt + "".join(pieces))

    def _summary(
        self,
        view: JobView,
        trial: Trial,
        endpoint: str,
        samples: tuple[str, ...],
        export: Path,
    ) -> Summary:
        if view.first_loss is None or view.loss is None or view.val_loss is None:
            raise SwarmError("the job serves but has no losses")
        sent, kills = view.bytes_by_kind, tuple(trial.kills)
        recoveries_s = [kill.recovery_s for kill in kills if kill.recovery_s is not None]
        return Summary(
            steps=view.step,
            first_loss=view.first_loss,
            final_loss=view.loss,
            val_loss=view.val_loss,
            seconds=round(time.monotonic() - self._started_s, 3),
            tokens_per_s=round(view.tokens_total / max(trial.training_s, 1e-9), 1),
            bytes_activation=sent.get("activation", 0) + sent.get("activation_gradient", 0),
            bytes_gradient=sent.get("gradient", 0) + sent.get("reduced", 0),
            killed_peer=kills[0].victim if kills else None,
            recovery_s=kills[0].recovery_s if kills else None,
            kills=kills,
            recovery_p50_s=round(median(recoveries_s), 3) if recoveries_s else None,
            recovery_max_s=max(recoveries_s, default=None),
            weights_sha256=weights_sha256(export),
            generations=view.generation,
            export_dir=str(export) if self._wanted.keep is not None else None,
            endpoint=endpoint,
            samples=samples,
        )


def job_description(data: Path, wanted: Wanted) -> dict[str, Any]:
    """The demo's job, as a job file would say it."""
    config = byte_llama_config()
    placement: dict[str, Any] = {"stages": 2, "slots": 2}
    run: dict[str, Any] = {"steps": wanted.steps, "seed": wanted.seed, "checkpoint_every": 50}
    if wanted.deterministic:
        half = config["num_hidden_layers"] // 2
        placement["layers"] = [half, config["num_hidden_layers"] - half]
        run["deterministic"] = True
    return {
        "name": "demo",
        "model": {"config": config},
        "data": {"path": str(data), "max_bytes": DATA_BYTES},
        "batch": {"rows": 4, "sequence_length": 128, "num_microbatches": 4},
        "codecs": {"activation": "int8", "activation_gradient": "int8"},
        "placement": placement,
        "run": run,
    }


# ---- around it ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _root(keep: Path | None) -> Iterator[Path]:
    """The folder for everything; a temporary one unless it is to be kept."""
    if keep is None:
        root = Path(tempfile.mkdtemp(prefix="swarmnode-demo-"))
        try:
            yield root
        finally:
            shutil.rmtree(root, ignore_errors=True)
        return
    root = keep.expanduser().absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
        used = any(root.iterdir())
    except OSError as error:
        raise UserError(f"{root} cannot be used: {error.strerror}; name another folder") from error
    if used:
        raise BusyError(f"{root} is not empty; name a new folder to keep the demo in")
    yield root


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Being asked to end is like Ctrl-C: everything is stopped on the way out."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_logs(swarm: LocalSwarm) -> None:
    """The ends of the logs: of the nodes that failed, else of the first one."""
    failed = [node for node in swarm.nodes if node.has_failed] or [swarm.node(0)]
    for node in failed:
        print(f"---- node {node.index}", printable(node.log_tail()), sep="\n", file=sys.stderr)


def _print_summary(console: Console, summary: Summary) -> None:
    facts = [
        f"{summary.steps} steps in {summary.seconds:.0f} s, {summary.tokens_per_s:.0f} tokens/s",
        f"loss {figure(summary.first_loss)} -> {figure(summary.final_loss)} nats per byte",
        f"held-out loss {figure(summary.val_loss)} nats per byte",
        f"sent for activations {amount(summary.bytes_activation, 'B')}",
        f"sent for parameter gradients {amount(summary.bytes_gradient, 'B')}",
    ]
    facts += [
        f"killed {kill.what} {kill.victim}; the swarm went on after {kill.recovery_s:.1f} s"
        for kill in summary.kills
        if kill.recovery_s is not None
    ]
    if summary.recovery_p50_s is not None and summary.recovery_max_s is not None:
        facts.append(
            f"recovery {summary.recovery_p50_s:.1f} s (p50), {summary.recovery_max_s:.1f} s (max); "
            f"generation {summary.generations}"
        )
    facts.append(f"weights {summary.weights_sha256}")
    if summary.export_dir is not None:
        facts.append(f"export: {summary.export_dir}")
    for number, sample in enumerate(summary.samples, start=1):
        console.print(Panel(Text(sample), title=f"sample {number}", title_align="left"))
    console.print(Panel(Text("\n".join(facts)), title="swarmnode demo: done", title_align="left"))
