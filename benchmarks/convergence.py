"""What compression does to a loss: runs paired on seed and data, what they must show asserted.

    python benchmarks/convergence.py [--suite smoke] [--seeds 0 1 2] [--text FILE]
                                     [--num-samples 800] [--num-epochs 3]
    python benchmarks/convergence.py --suite full --text FILE [FILE ...] --output ROWS.jsonl
                                     [--seeds 0] [--methods PRESET ...] [--num-steps 2000]
                                     [--batch 4] [--rate 0.003] [--picture FILE.svg]
                                     [--size DIM LAYERS HEADS] [--device cuda]

smoke, compressed boundaries. A byte-level GPT (4 layers of 64, 217 k parameters) has a cut after
each block but the last. Text is the standard library's sources unless a file is given. A gap is the
validation loss above that of the same seed without any coding, in nats per byte. One table, one
JSON line; exit code 1 if an ordering does not hold. Gradients in 2 bits are the negative control:
the test must see damage; bfloat16 is the other one: it must not see any where there is none.

full, compressed data parallelism: four slots train in turn in one process, each method (a preset
or text of `sync_specs`) from the same start on the same data in the same order. A row is a JSON
line, appended to the output when it ends; a row that is there is not run again. Exit code 1 if
the acceptance does not hold (`_full_suite.py`). Without --text it says so and runs nothing.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import _full_suite
import torch
from _environment import environment
from _language import Size
from _pilot import Method, Result, Windows, train
from _synced_run import Plan

from swarmnode.cli.demo_data import write_stdlib_sources
from swarmnode.codec_specs import PRESETS

METHODS = (  # named by the codec forward and, unless that is int8, the one backward
    Method("none"),
    Method("bf16", "bf16", "bf16"),
    Method("int8", "int8", "int8"),
    Method("int4", "int4/32", "int8"),
    Method("slow", PRESETS["slow"].activation, PRESETS["slow"].activation_gradient),
    Method("int2", "int2/32", "int8"),
    Method("int4,int2", "int4/32", "int2/32"),
    Method("aq/int4", "aq/int4/32", "int8"),
    Method("aq/int2", "aq/int2/32", "int8"),
)
TEXT_BYTES = 1_000_000


def broken_orderings(gaps: Mapping[str, float]) -> list[str]:
    """What does not hold of one seed's gaps."""
    claims = {
        "|gap(bf16)| < 0.005": abs(gaps["bf16"]) < 0.005,
        "gap(int8) < 0.01": gaps["int8"] < 0.01,
        "gap(int4) < 0.03": gaps["int4"] < 0.03,
        "gap(slow) < 0.03": gaps["slow"] < 0.03,
        "gap(int2) > 2 gap(int4)": gaps["int2"] > 2 * gaps["int4"],
        "gap(aq/int4) < 0.02": gaps["aq/int4"] < 0.02,
        "gap(aq/int2) < gap(int2) / 2": gaps["aq/int2"] < gaps["int2"] / 2,
        "gap(int4,int2) > 0.2": gaps["int4,int2"] > 0.2,
    }
    return [claim for claim, holds in claims.items() if not holds]


def read_text(path: Path | None) -> bytes:
    """The file's bytes, or a megabyte of the standard library."""
    if path is not None:
        return path.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "text"
        write_stdlib_sources(sources, TEXT_BYTES, seed=0)
        return b"".join(each.read_bytes() for each in sorted(sources.iterdir()))


def print_table(results: Mapping[int, Mapping[str, Result]]) -> None:
    print(f"{'method':<10}{'bits':>7}" + "".join(f"{f'seed {s}':>10}" for s in results))
    for method in METHODS:
        first = next(iter(results.values()))[method.name]
        cells = [
            each[method.name].validation - each["none"].validation for each in results.values()
        ]
        if method.name == "none":
            cells = [each["none"].validation for each in results.values()]
        print(
            f"{method.name:<10}{first.forward_bits:>7.2f}" + "".join(f"{c:>10.4f}" for c in cells)
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=["smoke", "full"], default="smoke")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--text", type=Path, nargs="+", default=[])
    parser.add_argument("--num-samples", type=int, default=800)
    parser.add_argument("--num-epochs", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=[])
    parser.add_argument("--num-steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--num-windows", type=int, default=512)
    parser.add_argument("--size", type=int, nargs=3, default=[192, 3, 4])
    parser.add_argument("--device", default="cpu", help="of the full suite")
    parser.add_argument("--output", type=Path, default=Path("convergence.jsonl"))
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args(arguments)
    if options.suite == "full":
        plan = Plan(
            options.num_steps,
            options.batch,
            options.rate,
            options.num_windows,
            size=Size(*options.size),
        )
        return _full_suite.main(
            options.text, options.methods, options.seeds, plan, options.output, options.picture,
            options.device,
        )  # fmt: skip
    if options.device != "cpu":
        parser.error("the smoke suite runs on the CPU; --device is of --suite full")
    torch.set_num_threads(1)
    path = options.text[0] if options.text else None
    text = read_text(path)
    began_s, results = time.process_time(), {}
    for seed in options.seeds:
        windows = Windows.of(text, seed, options.num_samples, options.num_epochs)
        results[seed] = {
            method.name: train(method, windows, lambda line: print(line, file=sys.stderr))
            for method in METHODS
        }
    print_table(results)
    gaps = {
        seed: {name: each.validation - found["none"].validation for name, each in found.items()}
        for seed, found in results.items()
    }
    broken = {seed: broken_orderings(each) for seed, each in gaps.items()}
    line = {
        "bench": "convergence",
        "suite": options.suite,
        "text": path.name if path else "standard library",
        "text_bytes": len(text),
        "num_samples": options.num_samples,
        "num_epochs": options.num_epochs,
        "cpu_s": round(time.process_time() - began_s, 1),
        "gaps": {s: {name: round(gap, 4) for name, gap in g.items()} for s, g in gaps.items()},
        "results": {s: {name: asdict(r) for name, r in f.items()} for s, f in results.items()},
        "broken": broken,
        **environment(["torch", "numpy"]),
    }
    print(json.dumps(line))
    return 1 if any(broken.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
