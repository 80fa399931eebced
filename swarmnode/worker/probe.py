"""What this machine's best device can do: measured once by a child with torch, then remembered.

The daemon itself never imports torch. Speeds are remembered by torch version and device; memory
is always read afresh.
"""

import asyncio
import json
import os
import platform
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pynvml
from pydantic import TypeAdapter

from swarmnode.children import python_module, spawn_child
from swarmnode.domain import DeviceSpec
from swarmnode.errors import ChildError

_FILE = "device.json"
_MAX_MESSAGE_BYTES = 1 << 16
_TIMEOUT_S = 120.0
"""Importing torch from a cold disk takes most of it; the measurement a third of a second."""
_SPEC = TypeAdapter(DeviceSpec)
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
"""Environment that changes what torch finds."""


async def probe(home: Path, *, refresh: bool = False) -> DeviceSpec:
    """The device's measured speed (remembered in `home` unless `refresh`) and its memory now.

    Raises: ChildError if torch cannot be imported or the device fails.
    """
    key = await asyncio.to_thread(device_key)
    path = home / _FILE
    known = None if refresh else _read(path, key)
    if known is not None:
        return await asyncio.to_thread(_with_memory_now, known)
    spec = await _measure(home)
    _write(path, key, spec)
    return spec


async def _measure(home: Path) -> DeviceSpec:
    child = spawn_child(
        python_module("swarmnode.worker.probe_child"),
        name="probe",
        log=home / "probe.log",
        max_message_bytes=_MAX_MESSAGE_BYTES,
    )
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            return DeviceSpec(**json.loads(await child.receive()))
    except TimeoutError:
        raise ChildError(f"probe: no answer in {_TIMEOUT_S:.0f} s") from None
    finally:
        await child.stop()


def device_key() -> str:
    """What the measured speeds depend on, told without torch: its version, devices, threads."""
    return " | ".join(
        (
            "1",
            f"torch {metadata.version('torch')}",
            f"{cpu_name()} x {num_cores()}",
            *(name for name, _, _ in _gpus()),
            *(f"{name}={os.environ.get(name, '')}" for name in _VARIABLES),
        )
    )


def num_cores() -> int:
    """CPU cores that this process may use."""
    with suppress(AttributeError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return plain(line.partition(":")[2])
    return plain(platform.processor() or platform.machine() or "cpu")


def plain(name: str) -> str:
    """A device name as adverts allow it: printable ASCII, at most 128 characters."""
    kept = "".join(c if " " <= c <= "~" else " " for c in name)
    return " ".join(kept.split())[:128] or "unknown"


def host_memory() -> tuple[int, int]:
    """Total and free bytes of main memory, or of our control group where that is less."""
    memory = psutil.virtual_memory()
    total_bytes, free_bytes = int(memory.total), int(memory.available)
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no control group, or no limit ("max")
        limit_bytes = int((group / "memory.max").read_text())
        used_bytes = int((group / "memory.current").read_text())
        total_bytes = min(total_bytes, limit_bytes)
        free_bytes = min(free_bytes, max(0, limit_bytes - used_bytes))
    return total_bytes, free_bytes


def _gpus() -> list[tuple[str, int, int]]:
    """Name, total and free bytes of each GPU; empty if there are none, or no driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            name = plain(str(pynvml.nvmlDeviceGetName(handle)))
            found.append((name, int(memory.total), int(memory.free)))
        return found
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def _gpu_memory(name: str) -> tuple[int, int] | None:
    """Total and free bytes of the GPU with this name; None if there is not exactly one."""
    named = [(total, free) for gpu, total, free in _gpus() if gpu == name]
    return named[0] if len(named) == 1 else None


def _with_memory_now(spec: DeviceSpec) -> DeviceSpec:
    """`spec` with the memory of this moment; as remembered where the driver does not tell."""
    memory = host_memory() if spec.kind == "cpu" else _gpu_memory(spec.name)
    if memory is None:
        return spec
    return replace(spec, memory_total_bytes=memory[0], memory_free_bytes=min(memory))


def _read(path: Path, key: str) -> DeviceSpec | None:
    """What was measured for this key; None if nothing was, or the file is damaged."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        return _SPEC.validate_python(content["spec"]) if content["key"] == key else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(path: Path, key: str, spec: DeviceSpec) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"key": key, "spec": asdict(spec)}, indent=1))
    part.replace(path)
