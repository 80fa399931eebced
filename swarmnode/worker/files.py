"""Where a job's state lies on a worker's disk: one folder for each stage.

`<step>.safetensors` is a snapshot, `<step>.fetched.safetensors` a state that came from others (it
may hold tensors that only another stage needs), `<step>.export.safetensors` was written to be
published; beside them lies the update log.
"""

from pathlib import Path
from typing import Literal

FileKind = Literal["snapshot", "export", "fetched"]
_SUFFIXES: dict[FileKind, str] = {
    "snapshot": ".safetensors",
    "export": ".export.safetensors",
    "fetched": ".fetched.safetensors",
}


def stage_directory(directory: Path, stage: int) -> Path:
    return directory / f"stage-{stage}"


def state_path(directory: Path, stage: int, step: int, kind: FileKind) -> Path:
    """The file of a stage's state after `step` committed steps."""
    return stage_directory(directory, stage) / f"{step}{_SUFFIXES[kind]}"


def read_state_name(path: Path) -> tuple[int, FileKind] | None:
    """The committed steps and the kind that a file's name says, or None for any other file."""
    number, dot, rest = path.name.partition(".")
    for kind, suffix in _SUFFIXES.items():
        if number.isdecimal() and dot + rest == suffix:
            return int(number), kind
    return None
