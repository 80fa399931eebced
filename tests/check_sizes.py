"""Fails if a source file of the project has grown over 400 lines: it has two nouns then."""

import subprocess
import sys
from pathlib import Path

MAX_LINES = 400


def main() -> int:
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.js", "*.css"], capture_output=True, text=True, check=True
    )
    long = [
        f"{name}: {count} lines, at most {MAX_LINES}"
        for name in listed.stdout.split()
        if Path(name).exists()
        and (count := len(Path(name).read_text(encoding="utf-8").splitlines())) > MAX_LINES
    ]
    print("\n".join(long) or f"no file is over {MAX_LINES} lines")
    return 1 if long else 0


if __name__ == "__main__":
    sys.exit(main())
