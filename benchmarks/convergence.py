"""What compressed boundaries do to a loss: small runs, paired on seed and data, orderings asserted.

    python benchmarks/convergence.py [--suite smoke] [--seeds 0 1 2] [--text FILE]
                                     [--num-samples 800] [--num-epochs 3]

A byte-level GPT (4 layers of 64, 217 k parameters) has a cut after each block but the last. Text
is the standard library's sources unless a file is given. A gap is the validation loss above that
of the same seed without any coding, in nats per byte. One table, one JSON line; exit code 1 if
an ordering does not hold. Gradients in 2 bits are the negative control: the test must see damage;
bfloat16 is the other one: it must not see any where there is none.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from _environment import environment
from _pilot import Method, Result, Windows, train

from swarmnode.cli.demo_data import write_stdlib_sources

METHODS = (  # named by the codec forward and, unless that is int8, the one backward
    Method("none"),
    Method("bf16", "bf16", "bf16"),
    Method("int8", "int8", "int8"),
    Method("int4", "int4/32", "int8"),
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
    parser.add_argument("--suite", choices=["smoke"], default="smoke")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--num-samples", type=int, default=800)
    parser.add_argument("--num-epochs", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    text = read_text(options.text)
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
        "text": options.text.name if options.text else "standard library",
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
