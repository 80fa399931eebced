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
    output.write_text(rows[0] + "\n" + rows[1][:50])
    run(*arguments)
    again = output.read_text().splitlines()
    assert again[0] == rows[0]
    assert json.loads(again[-1])["held_out"] == second["held_out"], "the same seed, the same loss"
