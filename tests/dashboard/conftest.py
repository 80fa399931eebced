"""The dashboard's generator and the fake node of the HTTP tests live in neighbouring folders."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "dashboard"), str(ROOT / "tests" / "http")]
