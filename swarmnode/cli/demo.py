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
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from swarmnode.cli.client import NodeClient
from swarmnode.cli.demo_data import write_stdlib_sources
from swarmnode.cli.display import Display
from swarmnode.cli.local_swarm import LocalSwarm
from swarmnode.cli.show import amount, figure, printable, short
from swarmnode.errors import BusyError, DataError, SwarmError, UserError
from swarmnode.http.api import JobView
from swarmnode.presets import byte_llama_config

DEFAULT_STEPS = 360
NUM_NODES = 4
STALL_S = 120.0
"""A job that does not move for so long has failed."""
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
    kill: bool
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
    recovery_s: float | None
    """From the kill to the next step that the swarm committed in its new placement."""
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
        self._training_s = 0.0
        self._killed: str | None = None
        self._recovery_s: float | None = None

    def run(self) -> Summary:
        display, client_of = self._display, self._swarm.node
        data = self._data()
        display.note(f"starting {NUM_NODES} nodes, each a daemon of its own")
        self._swarm.start()
        client = client_of(0).client
        display.note(f"all {NUM_NODES} see each other; the first one takes the job")
        job = client.submit(job_description(data, self._wanted), self._root)
        view = self._train(job)
        export = self._root / "export"
        display.note("exporting the weights as a Hugging Face folder")
        client.export(job, export)
        display.note(f"the swarm serves at {client.address}/v1; three samples")
        samples = tuple(self._sample(job, number) for number in range(len(PROMPTS)))
        if self._wanted.stay:
            self._stay(client)
        client.stop(job)
        display.note("stopping everything")
        self._swarm.stop()
        return self._summary(view, f"{client.address}/v1", samples, export)

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

    def _train(self, job: str) -> JobView:
        """Follow the job until it serves, and kill a worker on the way."""
        moved, moved_at_s = (0, ""), time.monotonic()
        began_s: float | None = None
        killing = _Killing(self._swarm, self._display) if self._wanted.kill else None
        for view in self._swarm.node(0).client.watch(job):
            now_s = time.monotonic()
            self._display.show(view)
            self._swarm.check()
            if began_s is None and view.phase == "training":
                began_s = now_s
            if view.step < view.num_steps or not self._training_s:
                self._training_s = now_s - (began_s or now_s)
            if killing is not None and view.step >= self._wanted.steps // 3:
                killing.look(view)
            if (view.step, view.phase) != moved:
                moved, moved_at_s = (view.step, view.phase), now_s
            elif now_s - moved_at_s > STALL_S:
                raise SwarmError(f"the job does not move: {view.phase} at step {view.step}")
        if view.phase != "serving":
            raise SwarmError(f"the job is {view.phase}: {view.reason or 'it gave no reason'}")
        if killing is not None:
            self._killed, self._recovery_s = killing.outcome()
        return view

    def _sample(self, job: str, number: int) -> str:
        prompt = PROMPTS[number]
        pieces = self._swarm.node(0).client.generate(
            job, prompt, max_tokens=SAMPLE_TOKENS, temperature=0.8, seed=self._wanted.seed + number
        )
        return printable(prompt + "".join(pieces))

    def _summary(
        self, view: JobView, endpoint: str, samples: tuple[str, ...], export: Path
    ) -> Summary:
        if view.first_loss is None or view.loss is None or view.val_loss is None:
            raise SwarmError("the job serves but has no losses")
        sent = view.bytes_by_kind
        return Summary(
            steps=view.step,
            first_loss=view.first_loss,
            final_loss=view.loss,
            val_loss=view.val_loss,
            seconds=round(time.monotonic() - self._started_s, 3),
            tokens_per_s=round(view.tokens_total / max(self._training_s, 1e-9), 1),
            bytes_activation=sent.get("activation", 0) + sent.get("activation_gradient", 0),
            bytes_gradient=sent.get("gradient", 0) + sent.get("reduced", 0),
            killed_peer=self._killed,
            recovery_s=None if self._recovery_s is None else round(self._recovery_s, 3),
            generations=view.generation,
            export_dir=str(export) if self._wanted.keep is not None else None,
            endpoint=endpoint,
            samples=samples,
        )


class _Killing:
    """Kills one worker, once, and measures how long the swarm takes to go on."""

    def __init__(self, swarm: LocalSwarm, display: Display) -> None:
        self._swarm = swarm
        self._display = display
        self._peer: str | None = None
        self._at_s = 0.0
        self._generation = 0
        self._step: int | None = None
        """Committed steps when the new placement was first seen."""
        self._recovery_s: float | None = None

    def look(self, view: JobView) -> None:
        """See the job as it is now, and act."""
        now_s = time.monotonic()
        if self._peer is None:
            if view.phase == "training" and view.placement:
                self._kill(view)
        elif self._step is None:
            if view.generation > self._generation:
                self._step = view.step
        elif self._recovery_s is None and view.step > self._step:
            self._recovery_s = now_s - self._at_s
            self._display.note(
                f"step {view.step} is committed without it, {self._recovery_s:.1f} s after the kill"
            )

    def outcome(self) -> tuple[str, float]:
        """Who was killed, and seconds until the swarm went on. Raises: SwarmError if it did not."""
        if self._peer is None:
            raise SwarmError("no worker was there to be killed")
        if self._recovery_s is None:
            raise SwarmError("no step was committed in a new placement after the kill")
        return self._peer, self._recovery_s

    def _kill(self, view: JobView) -> None:
        head = self._swarm.node(0).client.node().peer
        others = [peer for row in reversed(view.placement) for peer in row if peer != head]
        if not others:
            raise SwarmError("the first node hosts everything, so none can be lost")
        self._peer, self._generation = others[0], view.generation
        index = self._swarm.index_of(self._peer)
        self._at_s = time.monotonic()
        self._swarm.kill(index)
        self._display.note(f"killed node {index} ({short(self._peer)}) at step {view.step}")


def job_description(data: Path, wanted: Wanted) -> dict[str, Any]:
    """The demo's job, as a job file would say it."""
    return {
        "name": "demo",
        "model": {"config": byte_llama_config()},
        "data": {"path": str(data), "max_bytes": DATA_BYTES},
        "batch": {"rows": 4, "sequence_length": 128, "num_microbatches": 4},
        "codecs": {"activation": "int8", "activation_gradient": "int8"},
        "placement": {"stages": 2, "slots": 2},
        "run": {"steps": wanted.steps, "seed": wanted.seed, "checkpoint_every": 50},
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
    if summary.killed_peer is not None and summary.recovery_s is not None:
        facts.append(
            f"killed {summary.killed_peer}; the swarm went on after {summary.recovery_s:.1f} s "
            f"(generation {summary.generations})"
        )
    if summary.export_dir is not None:
        facts.append(f"export: {summary.export_dir}")
    for number, sample in enumerate(summary.samples, start=1):
        console.print(Panel(Text(sample), title=f"sample {number}", title_align="left"))
    console.print(Panel(Text("\n".join(facts)), title="swarmnode demo: done", title_align="left"))
