"""Measures this machine's best device with torch, tells the parent, and ends.

Run by hand, `python -m swarmnode.worker.probe_child`, it prints the same JSON.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import torch

from swarmnode.errors import ChildError
from swarmnode.pipes import ChildPipe
from swarmnode.worker import probe

_BUDGET_S = 0.1
"""Time for each of the three measurements; the best of the runs within it counts."""
_LARGE_RUN_S = 0.004
"""A product that takes this long is large enough to show what the device can do."""
_SMALLEST_SIDE, _LARGEST_SIDE = 512, 8192
"""Below the smallest, threads that wait for each other on a busy machine drown the product."""


def measure() -> dict[str, Any]:
    """The fields of a DeviceSpec; memory that is free now included."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else probe.cpu_name()
    flops = {
        dtype: matrix_flops(device, getattr(torch, dtype)) for dtype in ("float32", "bfloat16")
    }
    memory_bytes_per_s = memory_bandwidth(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free_bytes, total_bytes = torch.cuda.mem_get_info()
    else:
        total_bytes, free_bytes = probe.host_memory()
    return {
        "kind": device.type,
        "name": probe.plain(name),
        "flops": flops,
        "memory_bytes_per_s": memory_bytes_per_s,
        "memory_total_bytes": total_bytes,
        "memory_free_bytes": free_bytes,
        "num_cores": probe.num_cores(),
    }


def matrix_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square matrix products: the best over sides that grow to a few milliseconds."""
    side = _SMALLEST_SIDE
    best_flops = 0.0
    while True:
        left = torch.randn(side, side, device=device).to(dtype)
        right = torch.randn(side, side, device=device).to(dtype)
        multiply = _product(left, right)
        multiply()  # first use of a shape sets kernels up
        run_s = min(_timed(multiply, device) for _ in range(3))
        best_flops = max(best_flops, 2.0 * float(side) ** 3 / run_s)
        if run_s >= _LARGE_RUN_S or side >= _LARGEST_SIDE:
            break
        side *= 2
    return max(best_flops, 2.0 * float(side) ** 3 / _best_s(multiply, device))


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes."""
    largest = 1 << 28 if device.type == "cuda" else 1 << 26
    _, free_bytes = probe.host_memory()
    num_bytes = max(1 << 22, min(largest, free_bytes // 16))
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)

    def copy() -> None:
        target.copy_(source)

    copy()
    return 2.0 * num_bytes / _best_s(copy, device)


def _product(left: torch.Tensor, right: torch.Tensor) -> Callable[[], None]:
    target = torch.empty_like(left)

    def multiply() -> None:
        torch.mm(left, right, out=target)

    return multiply


def _best_s(work: Callable[[], None], device: torch.device) -> float:
    until_s = time.perf_counter() + _BUDGET_S
    best_s = _timed(work, device)
    while time.perf_counter() < until_s:
        best_s = min(best_s, _timed(work, device))
    return best_s


def _timed(work: Callable[[], None], device: torch.device) -> float:
    """Seconds of one run, the device's own queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start_s = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start_s


def main() -> None:
    try:
        pipe = ChildPipe.inherit()
    except ChildError:
        print(json.dumps(measure(), indent=1))
        return
    pipe.send(json.dumps(measure()).encode())


if __name__ == "__main__":
    main()
