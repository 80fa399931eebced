"""The smoke suite of compressed boundaries: its orderings hold, and a blind run fails.

The full suite, of data parallelism: only that it keeps its rows; a row that says something takes
minutes.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "convergence.py"


def run(*arguments: str) -> tuple[int, Any]:
    """(exit code, what does not hold: in the smoke suite orderings by seed) of the script."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])["broken"]


@pytest.mark.timeout(600)
def test_half_of_the_samples_show_every_ordering() -> None:
    assert run("--num-samples", "400") == (0, {"0": []})


@pytest.mark.timeout(300)
def test_a_run_too_short_to_see_damage_fails() -> None:
    code, broken = run("--num-samples", "32")
    assert code == 1
    assert "gap(int4,int2) > 0.2" in broken["0"]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_smoke_suite_holds_for_three_seeds() -> None:
    assert run("--seeds", "0", "1", "2") == (0, {"0": [], "1": [], "2": []})


def test_the_full_suite_without_a_text_says_so_and_runs_nothing() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--suite", "full"], capture_output=True, text=True, check=True
    )
    assert not done.stdout
    assert "skipped: it needs --text" in done.stderr


def test_a_row_of_the_full_suite_is_kept_and_not_run_again(tmp_path: Path) -> None:
    text, output, picture = tmp_path / "text", tmp_path / "rows.jsonl", tmp_path / "loss.svg"
    text.write_bytes(bytes(range(256)) * 40)
    arguments = (
        "--suite", "full", "--text", str(text), "--output", str(output), "--num-steps", "2",
        "--batch", "1", "--num-windows", "8", "--methods", "allreduce", "diloco,every=1",
        "--picture", str(picture),
    )  # fmt: skip
    code, broken = run(*arguments)
    assert (code, broken) == (
        1,
        ["cocktail was not run", "diloco was not run", "sparseloco was not run"],
    )
    rows = output.read_text().splitlines()
    first, second = map(json.loads, rows)
    assert first["up_ratio"] == pytest.approx(1, abs=1e-3)
    assert second["up_ratio"] == pytest.approx(0.5, abs=1e-3), "float32 every step"
    assert len(first["curve"]) == 2
    assert picture.stat().st_size > 1000
    assert first.pop("device") == "cpu"
    older = json.dumps(first)  # of a time when there was only the CPU
    output.write_text(older + "\n" + rows[1][:50])
    run(*arguments)
    again = output.read_text().splitlines()
    assert again[0] == older
    assert len(again) == 3, "nor is it run again"
    assert json.loads(again[-1])["held_out"] == second["held_out"], "the same seed, the same loss"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.timeout(300)
def test_a_row_of_a_gpu_is_near_that_of_the_cpu(tmp_path: Path) -> None:
    text, output = tmp_path / "text", tmp_path / "rows.jsonl"
    text.write_bytes(bytes(range(256)) * 40)
    for device in ("cpu", "cuda"):
        run(
            "--suite", "full", "--text", str(text), "--output", str(output), "--num-steps", "4",
            "--batch", "1", "--num-windows", "8", "--methods", "cocktail", "sparseloco,every=2",
            "--device", device,
        )  # fmt: skip
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["device"] for row in rows] == ["cpu", "cpu", "cuda", "cuda"]
    for on_cpu, on_gpu in zip(rows[:2], rows[2:], strict=True):
        assert on_gpu["up_bytes"] == on_cpu["up_bytes"]
        assert on_gpu["held_out"] == pytest.approx(on_cpu["held_out"], abs=0.02)
