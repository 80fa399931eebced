"""How long training stands still for a checkpoint: a blocking torch.save, and ours.

    python benchmarks/checkpoint_stall.py [--parameters 10e6 100e6 400e6] [--num-runs 7]

A state is float32 weights and two moments on the CPU, in random matrices. A step computes for
`--compute-s` (matrix products, as forward and backward do) and then applies the optimizer, which
must not change what is still being copied. One JSON line for each size, times in milliseconds:
`torch_save`: a blocking torch.save of the same state to the same disk;
`ours.blocked`: what the thread that trains waits, at the start of the snapshot and before the
optimizer; `ours.blocked_at_once`: the same if the optimizer comes at once, without computing;
`ours.slower`: how much longer the computing takes while the copy is made and written;
`optimizer_step`: one step of torch's AdamW on as many values, which `blocked` must stay below.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _environment import environment
from torch import Tensor

from swarmnode.worker.training.state import StageState

SIDE = 1024
MOMENTS = ("exp_avg", "exp_avg_sq")


class Module:
    """What a StageState asks of a module: its tensors by name."""

    def __init__(self, num_parameters: int) -> None:
        count = max(1, round(num_parameters / SIDE**2))
        self.weights = {f"layers.{i}.weight": torch.randn(SIDE, SIDE) for i in range(count)}

    def tensors_by_name(self) -> dict[str, Tensor]:
        return self.weights


class Optimizer:
    """What a StageState asks of an optimizer; its update itself takes no time."""

    def __init__(self, module: Module) -> None:
        self._moments = {
            f"{name}::{moment}": torch.rand(weight.shape)
            for name, weight in module.weights.items()
            for moment in MOMENTS
        }

    def moments(self) -> dict[str, Tensor]:
        return self._moments

    def apply(self, _gradients: Mapping[str, Tensor], *, step: int, num_steps: int) -> None:
        """Change nothing: only the wait before it is measured."""


def optimizer_steps(num_parameters: int, num_runs: int) -> list[float]:
    """Milliseconds of each of `num_runs` steps of AdamW, after one that makes its moments."""
    weights = [torch.randn(SIDE, SIDE) for _ in range(max(1, round(num_parameters / SIDE**2)))]
    for weight in weights:
        weight.grad = torch.randn(SIDE, SIDE)
    optimizer, times = torch.optim.AdamW(weights), []
    for _ in range(num_runs + 1):
        started_s = time.perf_counter()
        optimizer.step()
        times.append(1e3 * (time.perf_counter() - started_s))
    return times


def snapshot_of_today(state: StageState, path: Path, done: threading.Event) -> Callable[[], None]:
    """Start the product's snapshot; returns what ends it. THE SEAM: all that knows how it works."""
    try:
        from swarmnode.worker.engine.snapshots import Snapshots
    except ImportError:  # before lazy snapshots: copy now, write in a thread
        from swarmnode.worker.models import save_tensors

        copy = state.copied_tensors()
        writer = threading.Thread(target=lambda: (save_tensors(path, copy), done.set()))
        writer.start()
        return writer.join
    snapshots = Snapshots()

    def on_done(_path: Path, error: BaseException | None) -> None:
        assert error is None, error
        done.set()

    snapshots.start(0, state, path, on_done)
    return snapshots.close


def compute(num_products: int, a: Tensor, b: Tensor) -> float:
    """Seconds for so many matrix products."""
    started_s = time.perf_counter()
    for _ in range(num_products):
        torch.mm(a, b)
    return time.perf_counter() - started_s


def one_snapshot(state: StageState, path: Path, work: Callable[[], float]) -> tuple[float, float]:
    """Milliseconds that training is blocked, and seconds that the step's computing takes."""
    done = threading.Event()
    started_s = time.perf_counter()
    close = snapshot_of_today(state, path, done)
    blocked_s = time.perf_counter() - started_s
    compute_s = work()
    started_s = time.perf_counter()
    state.apply({}, num_steps=1)
    blocked_s += time.perf_counter() - started_s
    assert done.wait(600)
    close()
    assert path.stat().st_size > 0
    path.unlink()
    return 1e3 * blocked_s, compute_s


def measure(num_parameters: int, folder: Path, *, num_runs: int, compute_s: float) -> Any:
    module = Module(num_parameters)
    state = StageState(module, Optimizer(module), 0)  # type: ignore[arg-type]
    tensors = {**module.tensors_by_name(), **state.optimizer.moments()}  # type: ignore[union-attr]
    a, b = torch.randn(512, SIDE), torch.randn(SIDE, SIDE)
    num_products = max(1, round(compute_s / (compute(20, a, b) / 20)))
    saves, blocked, at_once, quiet, busy = [], [], [], [], []
    for _ in range(num_runs + 1):  # the first one warms up
        started_s = time.perf_counter()
        torch.save(tensors, folder / "blocking.pt")
        saves.append(1e3 * (time.perf_counter() - started_s))
        (folder / "blocking.pt").unlink()
        quiet.append(compute(num_products, a, b))
        for times, work in (
            (blocked, lambda: compute(num_products, a, b)),
            (at_once, lambda: 0.0),
        ):
            taken_ms, taken_s = one_snapshot(state, folder / "ours.safetensors", work)
            times.append(taken_ms)
            if times is blocked:
                busy.append(taken_s)
    slower = [1e3 * (with_s - median(quiet[1:])) for with_s in busy]
    return {
        "parameters": sum(w.numel() for w in module.weights.values()),
        "state_bytes": sum(t.nbytes for t in tensors.values()),
        "compute_s": round(median(quiet[1:]), 3),
        "torch_save": spread(saves),
        "optimizer_step": spread(optimizer_steps(num_parameters, num_runs)),
        "ours": {
            "blocked": spread(blocked),
            "blocked_at_once": spread(at_once),
            "slower": spread(slower),
        },
    }


def spread(times_ms: list[float]) -> dict[str, float]:
    """Median and both ends, without the first."""
    kept = sorted(times_ms[1:])
    return {
        "median_ms": round(median(kept), 2),
        "min_ms": round(kept[0], 2),
        "max_ms": round(kept[-1], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=float, nargs="+", default=[10e6, 100e6, 400e6])
    parser.add_argument("--num-runs", type=int, default=7)
    parser.add_argument("--compute-s", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary one unless given")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for parameters in args.parameters:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            figures = measure(
                int(parameters), Path(folder), num_runs=args.num_runs, compute_s=args.compute_s
            )
        case = {"bench": "checkpoint_stall", "num_runs": args.num_runs, "seed": 0}
        print(json.dumps({**case, **figures, **environment(["torch", "safetensors"])}), flush=True)


if __name__ == "__main__":
    main()
