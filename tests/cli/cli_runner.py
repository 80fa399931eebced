"""The command line, run in this process."""

import sys
from pathlib import Path
from typing import Any

import pytest

from swarmnode.cli.main import main


class Cli:
    """Runs the command line in this process."""

    def __init__(self, home: Path, monkeypatch: Any, capsys: Any) -> None:
        self._home, self._monkeypatch, self._capsys = home, monkeypatch, capsys

    def __call__(self, *args: str) -> tuple[int, str, str]:
        """Exit status, stdout and stderr of `swarmnode ARGS --home HOME`."""
        argv = ["swarmnode", *args, "--home", str(self._home)]
        self._monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as end:
            main()
        captured = self._capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err
