"""How much of sending is hidden behind computing: four daemons on shaped lines, all traced.

    python benchmarks/overlap.py [--draw docs/overlap.svg]

Needs root, iproute2 and the CPU control group (version 1); says so and skips where they lack. Four
nodes, two stages of two slots, each in a network namespace with a line of its own. The workers
compute for real, each with `--core-share` of a core by the kernel's quota: work that waits on one
node makes no other node faster, as it would on machines of their own. Daemons have no quota.

The rate follows from the run itself: it is that at which the bytes which a node sends and receives
in bf16, one after the other, take `--times` (3) as long as the node computes, forward and backward.
Lines carry both directions at once, so the busier direction alone takes about half of that.
One JSON line for each case; the last compares the steps.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _shaped
import _spans
import _timeline
import psutil
from _environment import environment

from swarmnode.children import leashed, python_module
from swarmnode.cli.demo_data import write_stdlib_sources

NUM_HOSTS, NUM_STAGES, NUM_SLOTS = 4, 2, 2
WARM_UP_STEPS = 2
LIMIT_S = 240.0
CODECS = {
    "bf16": ("bf16", "bf16", "bf16"),
    "home": ("int8", "int8", "int8"),
    "slow": ("int4/32", "int4/32+hadamard", "int4/32"),
}
"""Of hidden states, of their gradients, of parameter gradients."""


@dataclass(frozen=True)
class Case:
    """One job on lines of one rate."""

    name: str
    codecs: str
    slower: float | None = None
    """How many times slower the lines are than the calibrated rate; None for no shaping."""


CASES = (
    Case("plain", "bf16"),
    Case("home, unshaped", "home"),
    Case("slow, unshaped", "slow"),
    Case("plain, shaped", "bf16", 1.0),
    Case("home, shaped", "home", 1.0),
    Case("slow, 4 times slower", "slow", 4.0),
)


DRAWN = ("plain, shaped", "home, unshaped", "home, shaped", "slow, 4 times slower")


def main() -> None:
    """Measure the cases in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--core-share", type=float, default=0.25)
    parser.add_argument("--times", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=8, help="Measured steps of each case.")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=1, help="In each stage.")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--microbatches", type=int, default=32, help="In each slot.")
    parser.add_argument("--ahead", type=int, default=6, help="The jobs' run.ahead.")
    parser.add_argument("--rate", type=float, help="Bytes/s of a line; measured unless given.")
    parser.add_argument("--cases", default=",".join(str(i) for i in range(len(CASES))))
    parser.add_argument("--keep", type=Path, help="Folder for the traces.")
    parser.add_argument("--draw", type=Path)
    parser.add_argument(
        "--drawn", type=Path, nargs="+", default=[], help="Folders of --keep: only draw them."
    )
    options = parser.parse_args()
    if options.drawn:
        draw(options.drawn, options.draw)
        return
    if reason := _shaped.why_not():
        print(f"skipped: {reason}", file=sys.stderr)
        return
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        swarm = Swarm(options, options.keep or root, stack)
        rate, lines = options.rate, []
        for case in [CASES[int(word)] for word in options.cases.split(",")]:
            line = swarm.measure(case, rate)
            if case.name == "plain" and rate is None:
                rate = calibrated(line, options.times)
            lines.append(line)
            print(json.dumps(line), flush=True)
            with ((options.keep or root) / "lines.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        if options.draw:
            draw([options.keep or root], options.draw)
        print(json.dumps({"bench": "overlap", "rate_bytes_per_s": rate, **compared(lines)}))


def draw(folders: Sequence[Path], path: Path) -> None:
    """Draw the median step of every case whose traces are in `folders`."""
    panels = []
    for folder in folders:
        homes = [folder / f"node-{host}" for host in range(NUM_HOSTS)]
        for text in (folder / "lines.jsonl").read_text().splitlines():
            line = json.loads(text)
            if line["case"] not in DRAWN:
                continue
            traces = _spans.read(homes, line["job"])
            ends = _spans.commits(traces)
            steps = range(line["since"], line["since"] + line["num_steps"])
            step = sorted(steps, key=lambda s: ends[s] - ends[s - 1])[len(steps) // 2]
            seconds = ends[step] - ends[step - 1]
            rate = line["rate_bytes_per_s"]
            where = f"lines of {rate * 8e-6:.1f} Mbit/s" if rate else "unshaped"
            specs = ", ".join(dict.fromkeys(line["specs"]))
            title = f"{line['codecs']} ({specs}), {where}: {seconds:.2f} s"
            panels.append((title, traces, ends[step - 1], ends[step]))
    _timeline.draw(panels, path)


def calibrated(plain: dict[str, Any], times: float) -> float:
    """The rate at which the busiest node's bytes take `times` as long as its computing."""
    return float(max(plain["moved_bytes"]) / (times * plain["computing_s"]))


def compared(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Each step on shaped lines over the same job's on unshaped ones."""
    step_s = {line["case"]: line["step_s"]["median"] for line in lines}
    bases = {"bf16": "plain", "home": "home, unshaped", "slow": "slow, unshaped"}
    return {
        line["case"]: round(step_s[line["case"]] / step_s[bases[line["codecs"]]], 3)
        for line in lines
        if line["rate_bytes_per_s"] is not None and bases[line["codecs"]] in step_s
    }


class Swarm:
    """Four daemons, and the jobs that they run one after the other."""

    def __init__(
        self, options: argparse.Namespace, root: Path, stack: contextlib.ExitStack
    ) -> None:
        self._options, self._root = options, root
        self._hosts = stack.enter_context(_shaped.hosts(NUM_HOSTS))
        self._shares = [
            stack.enter_context(_shaped.core_share(f"node{host}", options.core_share))
            for host in range(NUM_HOSTS)
        ]
        self._homes = [root / f"node-{host}" for host in range(NUM_HOSTS)]
        self._daemons = [stack.enter_context(self._daemon(0))]
        first = until(lambda: self._ask("status"))
        for host in range(1, NUM_HOSTS):
            daemon = self._daemon(host, "--join", first["join_address"])
            self._daemons.append(stack.enter_context(daemon))
        peers = until(lambda: self._all_peers())
        self._pins = {peer: index % NUM_STAGES for index, peer in enumerate(sorted(peers))}
        self._text = root / "text"
        write_stdlib_sources(self._text, 1 << 20, seed=0)

    def measure(self, case: Case, rate: float | None) -> dict[str, Any]:
        """Run one case. Raises: RuntimeError if it does not get along in time."""
        options = self._options
        bytes_per_s = None if case.slower is None or rate is None else rate / case.slower
        if case.slower is not None and rate is None:
            raise RuntimeError("measure the plain case first, or give --rate")
        self._hosts.shape(None)
        path = self._root / f"{case.name.replace(' ', '-').replace(',', '')}.toml"
        path.write_text(self._job_text(case))
        job = self._ask("submit", str(path))["job"]
        self._wait(job, WARM_UP_STEPS)
        if bytes_per_s is not None:
            self._hosts.shape(bytes_per_s)
        since = self._wait(job, self._last(job) + WARM_UP_STEPS + 1) + 1
        throttled_s = [share.throttled_s() for share in self._shares]
        load, spent_s = psutil.cpu_times(), self._cpu_s()
        began_s = time.monotonic()
        self._wait(job, since + options.steps - 1)
        seconds, after = time.monotonic() - began_s, psutil.cpu_times()
        cores = {part: (end - spent_s[part]) / seconds for part, end in self._cpu_s().items()}
        view = self._ask("jobs")
        self._hosts.shape(None)
        self._ask("stop", job)
        traces = _spans.read(self._homes, job)
        found = _spans.summary(traces, since, since + options.steps)
        return {
            "bench": "overlap",
            "case": case.name,
            "codecs": case.codecs,
            "specs": CODECS[case.codecs],
            "rate_bytes_per_s": bytes_per_s,
            **found,
            "moved_bytes": moved(traces, since, since + options.steps),
            "grid": [NUM_STAGES, NUM_SLOTS],
            "batch": [options.microbatches, options.rows, options.sequence_length],
            "hidden": options.hidden,
            "layers": options.layers,
            "ahead": options.ahead,
            "congestion_control": _shaped.CONGESTION_CONTROL,
            "core_share": options.core_share,
            "idle_cores": round((after.idle - load.idle) / seconds, 2),
            "busy_cores": {part: round(count, 2) for part, count in cores.items()},
            "throttled_share": [
                round((share.throttled_s() - before) / seconds, 2)
                for share, before in zip(self._shares, throttled_s, strict=True)
            ],
            "since": since,
            "job": job,
            "generations": [each["generation"] for each in view if each["job"] == job],
            **environment(),
        }

    def _job_text(self, case: Case) -> str:
        """The job as a file; who holds which stage is given, so that no plan moves anybody."""
        options = self._options
        activation, activation_gradient, gradient = CODECS[case.codecs]
        config = self._root / "config.json"
        config.write_text(
            json.dumps(
                {
                    "model_type": "llama", "vocab_size": 320, "hidden_size": options.hidden,
                    "intermediate_size": 3 * options.hidden,
                    "num_hidden_layers": NUM_STAGES * options.layers, "num_attention_heads": 4,
                    "num_key_value_heads": 4, "max_position_embeddings": options.sequence_length,
                    "tie_word_embeddings": False,
                }
            )
        )  # fmt: skip
        pins = "\n".join(f'"{peer}" = {stage}' for peer, stage in self._pins.items())
        return f"""
name = "overlap"
[model]
config = "{config}"
[data]
path = "{self._text}"
[batch]
rows = {options.rows}
sequence_length = {options.sequence_length}
num_microbatches = {options.microbatches * NUM_SLOTS}
[codecs]
activation = "{activation}"
activation_gradient = "{activation_gradient}"
gradient = "{gradient}"
[placement]
stages = {NUM_STAGES}
slots = {NUM_SLOTS}
min_peers = {NUM_HOSTS}
layers = {[options.layers] * NUM_STAGES}
[placement.pins]
{pins}
[run]
steps = 100000
checkpoint_every = 0
evaluate_microbatches = 1
ahead = {options.ahead}
"""

    # ---- the nodes -------------------------------------------------------------------------

    @contextlib.contextmanager
    def _daemon(self, host: int, *args: str) -> Iterator[subprocess.Popen[bytes]]:
        home = self._homes[host]
        home.mkdir(parents=True)
        (home / "config.toml").write_text("trace = true\n")
        command = python_module(
            "swarmnode.cli.main", "up", "--home", str(home), "--threads", "1",
            "--host", self._hosts.address(host), *args,
        )  # fmt: skip
        with (home / "output.log").open("wb") as output:
            process = subprocess.Popen(
                leashed(self._hosts.inside(host, command)), stdout=output, stderr=output
            )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)

    def _hold_workers(self) -> None:
        """Give the quota to whatever computes for a job by now."""
        for host, share in enumerate(self._shares):
            for process in self._processes(host):
                if _is_worker(process):
                    share.hold(process.pid)

    def _cpu_s(self) -> dict[str, float]:
        """CPU seconds so far: of all workers, and of all other processes of the nodes."""
        total = {"workers": 0.0, "daemons": 0.0}
        for host in range(NUM_HOSTS):
            for process in self._processes(host):
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    part = "workers" if _is_worker(process) else "daemons"
                    total[part] += times.user + times.system
        return total

    def _processes(self, host: int) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            daemon = psutil.Process(self._daemons[host].pid)
            return [daemon, *daemon.children(recursive=True)]
        return []

    def _all_peers(self) -> list[str] | None:
        found = self._ask("peers") or ()
        return [peer["peer"] for peer in found] if len(found) == NUM_HOSTS else None

    def _ask(self, *args: str) -> Any:
        """The JSON answer of a verb beside the first daemon; None while it does not answer."""
        verb = python_module("swarmnode.cli.main", *args, "--home", str(self._homes[0]), "--json")
        argv = self._hosts.inside(0, verb)
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
        return json.loads(done.stdout) if done.returncode == 0 else None

    def _last(self, job: str) -> int:
        """The newest step that all nodes have applied; -1 before there is one."""
        return min(_spans.last_applied(home, job) for home in self._homes)

    def _wait(self, job: str, step: int) -> int:
        """Wait until all have applied `step`; the newest such step."""
        deadline_s = time.monotonic() + LIMIT_S
        while (last := self._last(job)) < step:
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"step {step} is not reached: {self._ask('jobs')}")
            self._hold_workers()
            time.sleep(0.5)
        return last


def _is_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "swarmnode.worker.engine.nursery" in process.cmdline()
    return False


def moved(traces: list[_spans.NodeTrace], since: int, until_step: int) -> list[int]:
    """Bytes of frames that each node sends and receives in one step, together."""
    total = [0] * len(traces)
    for transfer in _spans.transfers(traces):
        if since <= transfer.step < until_step:
            total[transfer.sender] += transfer.num_bytes
            total[transfer.receiver] += transfer.num_bytes
    return [count // (until_step - since) for count in total]


def until(question: Any, timeout_s: float = 90.0) -> Any:
    """The first true answer. Raises: RuntimeError if there is none in time."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if answer := question():
            return answer
        time.sleep(0.2)
    raise RuntimeError("the swarm does not get ready in time")


if __name__ == "__main__":
    main()
