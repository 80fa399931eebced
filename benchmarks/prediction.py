"""Predicted beside measured step time of a real job: four daemons in four network namespaces.

Needs root, /dev/net/tun, iproute2 and a switch program that gives namespaces latency and
bandwidth, `--switch` (prints READY and serves namespaces sn0, sn1, .. at 10.77.0.1, 10.77.0.2, ..
until it is told to end). Skips, and says so, where one is missing. One JSON line for each rate;
`--draw` makes a picture of them.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _environment import environment

from swarmnode.children import leashed, python_module
from swarmnode.cli.demo_data import write_stdlib_sources
from swarmnode.presets import byte_llama_config

NUM_HOSTS = 4
WARM_UP_STEPS = 12
"""Steps until speeds and links are known, and the placement that they ask for is taken."""


def main() -> None:
    """Measure at each rate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--switch", type=Path, default=Path("../shared/tools/netlab.py"))
    parser.add_argument("--rates-mbit", default="20,60,200")
    parser.add_argument("--rtt-ms", type=float, default=20.0)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--draw", type=Path)
    options = parser.parse_args()
    if reason := why_not(options.switch):
        print(f"skipped: {reason}", file=sys.stderr)
        return
    lines = []
    for rate in (float(word) for word in options.rates_mbit.split(",")):
        lines.append(measure(options, rate))
        print(json.dumps(lines[-1]), flush=True)
    if options.draw:
        draw(lines, options.draw)


def why_not(switch: Path) -> str:
    """Why this cannot run here; empty if it can."""
    if not switch.is_file():
        return f"no switch program at {switch}; name one with --switch"
    if os.geteuid() != 0 or shutil.which("ip") is None or not Path("/dev/net/tun").exists():
        return "needs root, iproute2 and /dev/net/tun"
    return ""


def measure(options: argparse.Namespace, rate_mbit: float) -> dict[str, Any]:
    """Train the demo's model on four shaped hosts, and read both figures as the job runs."""
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(shaped_hosts(options.switch, rate_mbit, options.rtt_ms))
        first = stack.enter_context(node(0, root))
        join = until(lambda: ask(0, first, "status")).get("join_address")
        for host in range(1, NUM_HOSTS):
            stack.enter_context(node(host, root, "--join", join))
        until(lambda: len(ask(0, first, "peers") or ()) == NUM_HOSTS)
        job = root / "job.toml"
        job.write_text(job_text(root, options))
        name = ask(0, first, "submit", str(job))["job"]
        views = list(watch(first, name, options.steps))
    seen = {view["step"]: view for view in views if view["step_s"] and view["predicted_step_s"]}
    last = [seen[step] for step in sorted(seen) if step > WARM_UP_STEPS]
    measured = sorted(view["step_s"] for view in last)
    predicted_s = statistics.median(view["predicted_step_s"] for view in last)
    measured_s = statistics.median(measured)
    return {
        "bench": "prediction",
        "rate_mbit": rate_mbit,
        "rtt_ms": options.rtt_ms,
        "grid": [options.stages, options.slots],
        "num_steps": len(last),
        "generation": last[-1]["generation"],
        "predicted_s": predicted_s,
        "measured_s": {
            "median": measured_s,
            "p10": measured[len(measured) // 10],
            "p90": measured[-1 - len(measured) // 10],
        },
        "ratio": predicted_s / measured_s,
        **environment(),
    }


def job_text(root: Path, options: argparse.Namespace) -> str:
    """The demo's model on Python's own sources."""
    text = root / "text"
    write_stdlib_sources(text, 1_000_000, seed=0)
    config = byte_llama_config()
    config_path = root / "config.json"
    config_path.write_text(json.dumps(config))
    return f"""
name = "prediction"
[model]
config = "{config_path}"
[data]
path = "{text}"
[batch]
rows = 4
sequence_length = 128
num_microbatches = {4 * options.slots}
[placement]
stages = {options.stages}
slots = {options.slots}
min_peers = {NUM_HOSTS}
layers = {json.dumps(even(int(config["num_hidden_layers"]), options.stages))}
[run]
steps = {options.steps}
checkpoint_every = 0
evaluate_microbatches = 1
"""


def even(num_layers: int, num_stages: int) -> list[int]:
    """Near-equal layers for each stage."""
    return [num_layers // num_stages + (s < num_layers % num_stages) for s in range(num_stages)]


# ---- shaped hosts ------------------------------------------------------------------------------


@contextlib.contextmanager
def shaped_hosts(switch: Path, rate_mbit: float, rtt_ms: float) -> Iterator[None]:
    """Namespaces sn0 .. sn3 for as long as the context lasts."""
    argv = [sys.executable, str(switch), str(NUM_HOSTS), "--rtt", str(rtt_ms)]
    argv += ["--rate", f"{rate_mbit:g}mbit"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "READY":
            raise RuntimeError("the switch program did not start")
        yield
    finally:
        process.terminate()
        process.wait(30)


@contextlib.contextmanager
def node(host: int, root: Path, *args: str) -> Iterator[Path]:
    """A daemon in a namespace; yields its home."""
    home = root / f"node-{host}"
    home.mkdir()
    argv = inside(
        host, "up", "--home", str(home), "--threads", "1", "--host", f"10.77.0.{host + 1}"
    )
    with (home / "output.log").open("wb") as output:
        process = subprocess.Popen(leashed([*argv, *args]), stdout=output, stderr=output)
    try:
        yield home
    finally:
        process.terminate()
        process.wait(30)


def inside(host: int, *args: str) -> list[str]:
    return ["ip", "netns", "exec", f"sn{host}", *python_module("swarmnode.cli.main", *args)]


def ask(host: int, home: Path, *args: str) -> Any:
    """The JSON answer of a verb beside a daemon; None while it does not answer."""
    argv = inside(host, *args, "--home", str(home), "--json")
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else None


def until(question: Any, timeout_s: float = 120.0) -> Any:
    """The first true answer."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if answer := question():
            return answer
    raise RuntimeError("the swarm does not get ready in time")


def watch(home: Path, job: str, num_steps: int) -> Iterator[dict[str, Any]]:
    """Every view of the job until its steps are done."""
    argv = inside(0, "watch", job, "--home", str(home), "--json")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            view = json.loads(line)
            if view["phase"] == "failed":
                raise RuntimeError(view["reason"])
            yield view
            if view["step"] >= num_steps:
                break
        process.terminate()


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Predicted and measured seconds over the rate."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    rates = [line["rate_mbit"] for line in lines]
    median = [line["measured_s"]["median"] for line in lines]
    low = [m - line["measured_s"]["p10"] for m, line in zip(median, lines, strict=True)]
    high = [line["measured_s"]["p90"] - m for m, line in zip(median, lines, strict=True)]
    axes.errorbar(rates, median, (low, high), fmt="o-", capsize=4, label="measured, p10 to p90")
    axes.plot(rates, [line["predicted_s"] for line in lines], "s--", label="predicted")
    axes.set(xscale="log", xlabel="uplink of every host, Mbit/s", ylabel="seconds per step")
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
