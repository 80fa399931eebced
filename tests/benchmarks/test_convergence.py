"""The smoke suite of compressed boundaries: its orderings hold, and a blind run fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "convergence.py"


def run(*arguments: str) -> tuple[int, dict[str, list[str]]]:
    """(exit code, orderings that do not hold, by seed) of the script."""
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
