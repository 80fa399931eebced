"""What a simulation is of: machines, jobs, how people come and go, and what goes wrong."""

import tomllib
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field

from swarmnode.errors import DataError
from swarmnode.manifest import Section, check

FaultKind = Literal[
    "kill", "power", "freeze", "partition", "one_way", "cut", "slow_network", "repeat", "corrupt",
    "full_disk", "slow_disk", "rot", "live_rot", "child", "leave", "join", "wipe",
    "clock",
]  # fmt: skip
MENDABLE: tuple[FaultKind, ...] = tuple(kind for kind in get_args(FaultKind) if kind != "live_rot")
"""What a job must survive. Nobody promises to find files that rot under a running daemon."""
Range = tuple[float, float]


class SwarmSection(Section):
    """The machines, drawn evenly from ranges."""

    nodes: tuple[int, int] = (4, 5)
    """Fewest and most machines at the start."""
    latency_ms: Range = (1.0, 20.0)
    """From a machine to the middle of the network."""
    mbit: Range = (20.0, 200.0)
    """Of each machine's line."""
    speed: Range = (0.8, 1.2)
    """Computing, relative to the job's `step_s`."""
    slots_per_node: int = Field(default=2, ge=1, le=64)
    """For how many slots a machine has memory."""
    lease_s: float = Field(default=12.0, gt=0)
    """How long a machine that is gone stays in the directory."""
    tick_s: float = Field(default=1.0, gt=0)
    """How often a coordinator looks around."""
    load_s: tuple[float, ...] = Field(default=(0.1, 0.1, 1.0, 8.0, 40.0), min_length=1)
    """A restarted daemon reads and checks what is on its disk for one of these, drawn evenly."""


class JobSection(Section):
    """One job, submitted to one of the machines."""

    name: str = "job"
    stages: int = Field(default=2, ge=1, le=64)
    slots: int = Field(default=2, ge=1, le=64)
    steps: int = Field(default=8, ge=1)
    microbatches: int = Field(default=4, ge=1)
    checkpoint_every: int = Field(default=4, ge=0)
    evaluate_every: int = Field(default=0, ge=0)
    step_s: float = Field(default=0.4, gt=0)
    """Seconds that a machine of speed 1 computes for one slot in one step."""
    update_mb: float = Field(default=0.5, ge=0)
    """Size of a stage's update."""
    state_mb: float = Field(default=5.0, ge=0)
    """Size of a stage's state."""
    swinging_links: bool = False
    """Whether links look slow and fast in turn, so that their codecs change again and again."""


class Availability(Section):
    """How volunteers come and go, for as long as the scenario lasts."""

    session_h: float = Field(gt=0)
    """Mean time that a machine is there."""
    away_h: float = Field(gt=0)
    """Mean time until it comes back."""
    polite_share: float = Field(default=0.5, ge=0, le=1)
    """Share of departures that are said before; the others are kills and losses of power."""
    lost_share: float = Field(default=0.01, ge=0, le=1)
    """Share of departures after which the machine comes back with an empty disk."""


class FaultSection(Section):
    """What goes wrong until the quiet point."""

    every_s: float = Field(default=4.0, gt=0)
    """Mean time between two faults."""
    first_s: float = Field(default=2.0, ge=0)
    last_s: float = Field(default=40.0, ge=0)
    """No fault begins after this; whatever is broken by then is mended soon."""
    kinds: tuple[FaultKind, ...] = MENDABLE
    most_wiped: int = Field(default=1, ge=0)
    """Disks that are lost in one run."""


class Scenario(Section):
    """Everything that, with a seed, decides a run."""

    name: str = "scenario"
    about: str = ""
    """One line for people."""
    duration_s: float | None = Field(default=None, gt=0)
    """The run ends then, done or not; without it, when the jobs are done."""
    stall_s: float = Field(default=1800.0, gt=0)
    """With `duration_s`: every job that is not done must have committed a step in the last so many
    seconds, if machines enough for all jobs were there all the while."""
    budget_s: float = Field(default=600.0, gt=0)
    """Without `duration_s`: jobs must be done so long after the last fault."""
    swarm: SwarmSection = SwarmSection()
    jobs: tuple[JobSection, ...] = Field(default=(JobSection(),), min_length=1)
    availability: Availability | None = None
    faults: FaultSection | None = None


def load_scenario(path: Path) -> Scenario:
    """Raises: ManifestError, DataError with one line that says what is wrong."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; see examples/scenarios") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{path}: not readable as TOML: {error}") from error
    return check(Scenario, raw, str(path))
