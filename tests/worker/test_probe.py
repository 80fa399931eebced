"""The probe measures once, in a child, and remembers."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from swarmnode.domain import DeviceSpec
from swarmnode.errors import ChildError
from swarmnode.worker import probe as module
from swarmnode.worker.probe import device_key, host_memory, num_cores, plain, probe


@pytest.mark.processes
async def test_the_probe_measures_this_machine_and_remembers(tmp_path: Path) -> None:
    spec = await probe(tmp_path)
    assert spec.kind in ("cpu", "cuda")
    assert set(spec.flops) == {"float32", "bfloat16"}
    assert all(1e8 < flops < 1e17 for flops in spec.flops.values())
    assert 1e8 < spec.memory_bytes_per_s < 1e15
    assert 0 < spec.memory_free_bytes <= spec.memory_total_bytes
    assert spec.num_cores == num_cores()
    stored = tmp_path / "device.json"
    content = json.loads(stored.read_text())
    content["spec"]["flops"]["float32"] = 123456789.0
    stored.write_text(json.dumps(content))
    assert (await probe(tmp_path)).flops["float32"] == 123456789.0
    assert (await probe(tmp_path, refresh=True)).flops["float32"] != 123456789.0


async def test_memory_is_read_afresh_from_what_is_remembered(tmp_path: Path) -> None:
    old = DeviceSpec("cpu", "x", {"float32": 1e9, "bfloat16": 1e9}, 1e9, 10, 5, num_cores())
    module._write(tmp_path / "device.json", device_key(), old)
    spec = await probe(tmp_path)
    assert spec.flops == old.flops
    assert spec.memory_total_bytes == host_memory()[0]
    assert 1 << 20 < spec.memory_free_bytes <= spec.memory_total_bytes


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": 1}', '{"key": "k", "spec": {"a": 1}}'])
def test_a_damaged_memory_is_forgotten(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "device.json"
    path.write_text(damage)
    assert module._read(path, "k") is None


def test_what_was_measured_for_another_device_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    spec = DeviceSpec("cpu", "x", {"float32": 1e9, "bfloat16": 1e9}, 1e9, 10, 5, 2)
    module._write(path, "torch 1 | a", spec)
    assert module._read(path, "torch 1 | a") == spec
    assert module._read(path, "torch 2 | a") is None
    assert asdict(spec) == json.loads(path.read_text())["spec"]


@pytest.mark.processes
async def test_a_failing_probe_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no such torch')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ChildError, match="no such torch"):
        await probe(tmp_path)
    assert not (tmp_path / "device.json").exists()


def test_the_daemons_side_does_not_import_torch() -> None:
    code = "import sys, swarmnode.worker.probe as p; p.device_key(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_device_names_are_plain_ascii() -> None:
    assert plain("  Ge\u00e9Force\tRTX\x00 4090 ") == "Ge Force RTX 4090"
    assert plain("\u00e9") == "unknown"
    assert len(plain("x" * 500)) == 128
