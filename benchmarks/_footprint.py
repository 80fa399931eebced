"""What the living processes of a swarm take, sampled regularly, and whether that stays flat."""

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import psutil

YOUNG_S, OLD_S = 20.0, 90.0
"""Daemons are compared at these ages: before, they still start; few live longer."""
TOLERANCE = 0.15
"""The last third of a run may lie so much above the second."""
DISK_TOLERANCE = 0.25
"""The same for what lies on disk, where checkpoints, snapshots and logs come and go."""
FEWEST_SAMPLES = 3
"""In a third; with fewer nothing can be said."""


@dataclass(frozen=True)
class NodeSample:
    """One living node at one time. USS: memory that would be free if the process ended."""

    at_s: float
    node: int
    age_s: float
    daemon: int
    """Its process id."""
    daemon_rss_bytes: int
    daemon_uss_bytes: int
    daemon_fds: int
    uss_bytes: int
    """Of all its processes."""
    fds: int
    """Of all its processes."""


@dataclass(frozen=True)
class SwarmSample:
    """All living nodes, and the homes of all."""

    at_s: float
    num_nodes: int
    uss_bytes: int
    fds: int
    disk_bytes: int
    disk_files: int


@dataclass(frozen=True)
class Flatness:
    """Means of the second and of the last third of a run; None where there were too few samples."""

    second: float | None
    last: float | None
    tolerance: float

    @property
    def is_flat(self) -> bool:
        if self.second is None or self.last is None:
            return True
        return self.last <= self.second * (1 + self.tolerance)


def sample_node(
    at_s: float, node: int, age_s: float, daemon: int, processes: Iterable[psutil.Process]
) -> NodeSample | None:
    """None if the process `daemon` is gone."""
    rss = uss = fds = all_uss = all_fds = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            memory, num_fds = process.memory_full_info(), process.num_fds()
            all_uss, all_fds = all_uss + memory.uss, all_fds + num_fds
            if process.pid == daemon:
                rss, uss, fds = memory.rss, memory.uss, num_fds
    if not rss:
        return None
    return NodeSample(at_s, node, age_s, daemon, rss, uss, fds, all_uss, all_fds)


def disk_of(homes: Iterable[Path]) -> tuple[int, int]:
    """Bytes on disk, and files."""
    num_bytes = num_files = 0
    for home in homes:
        for folder, _, names in os.walk(home):
            for name in names:
                with contextlib.suppress(OSError):
                    num_bytes += 512 * os.lstat(f"{folder}/{name}").st_blocks
                    num_files += 1
    return num_bytes, num_files


def flatness(
    points: Sequence[tuple[float, float]], duration_s: float, tolerance: float
) -> Flatness:
    """Of points (seconds from the start, value)."""
    thirds = (
        [value for at_s, value in points if low <= 3 * at_s / duration_s < low + 1]
        for low in (1, 2)
    )
    second, last = (mean(third) if len(third) >= FEWEST_SAMPLES else None for third in thirds)
    return Flatness(second, last, tolerance)


def lives_of(samples: Iterable[NodeSample]) -> list[list[NodeSample]]:
    """The samples of each life of each daemon."""
    lives: defaultdict[tuple[int, int], list[NodeSample]] = defaultdict(list)
    for sample in samples:
        lives[sample.node, sample.daemon].append(sample)
    return list(lives.values())


def growth(samples: Iterable[NodeSample], value: Callable[[NodeSample], float]) -> float | None:
    """Per minute of a daemon's life, pooled over all lives: one line through each, one slope."""
    top = bottom = 0.0
    for life in lives_of(s for s in samples if s.age_s >= YOUNG_S):
        age, level = mean(s.age_s for s in life), mean(value(s) for s in life)
        top += sum((s.age_s - age) * (value(s) - level) for s in life)
        bottom += sum((s.age_s - age) ** 2 for s in life)
    return 60 * top / bottom if bottom else None


def verdicts(
    nodes: Sequence[NodeSample], swarm: Sequence[SwarmSample], duration_s: float
) -> dict[str, Flatness]:
    """What must stay flat."""
    grown = [s for s in nodes if YOUNG_S <= s.age_s < OLD_S]
    daemons: dict[str, Callable[[NodeSample], float]] = {
        "daemon_rss_bytes": lambda s: s.daemon_rss_bytes,
        "daemon_uss_bytes": lambda s: s.daemon_uss_bytes,
        "daemon_fds": lambda s: s.daemon_fds,
    }
    wholes: dict[str, Callable[[SwarmSample], float]] = {
        "uss_bytes_per_node": lambda s: s.uss_bytes / max(1, s.num_nodes),
        "fds_per_node": lambda s: s.fds / max(1, s.num_nodes),
    }
    disks: dict[str, Callable[[SwarmSample], float]] = {
        "disk_bytes": lambda s: s.disk_bytes,
        "disk_files": lambda s: s.disk_files,
    }
    return (
        {k: flatness([(s.at_s, of(s)) for s in grown], duration_s, TOLERANCE)
         for k, of in daemons.items()}
        | {k: flatness([(s.at_s, of(s)) for s in swarm], duration_s, TOLERANCE)
           for k, of in wholes.items()}
        | {k: flatness([(s.at_s, of(s)) for s in swarm], duration_s, DISK_TOLERANCE)
           for k, of in disks.items()}
    )  # fmt: skip
