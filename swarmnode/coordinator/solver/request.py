"""What the coordinator asks the solver, and what it answers: plain data that crosses a pipe."""

from dataclasses import dataclass, replace

from swarmnode.coordinator.measurements import MeasuredLink
from swarmnode.coordinator.solver.decision import Decision
from swarmnode.domain import Advert, ModelFacts, PeerId, Plan
from swarmnode.manifest import OpenJob, PlacedJob, PlacementConfig


def _kind(advert: Advert) -> tuple[str, str, int]:
    return advert.device.kind, advert.device.name, advert.device.num_cores


EVEN = 1.25
"""Measured speeds differ by less than this factor between machines that are alike."""


@dataclass(frozen=True)
class Swarm:
    """The machines that a job may use, and what is known of them."""

    peers: tuple[Advert, ...]
    links: tuple[MeasuredLink, ...] = ()
    flops: tuple[tuple[PeerId, float], ...] = ()
    """FLOP/s that a peer really reached in this job."""

    def settled(self) -> "Swarm":
        """Machines of one kind as fast as the fastest of them was measured.

        A measurement in a busy moment is too low, never too high; what is decided for the life
        of a job should not hang on one.
        """
        best: dict[tuple[str, str, int], dict[str, float]] = {}
        for advert in self.peers:
            speeds = best.setdefault(_kind(advert), {})
            for dtype, flops in advert.device.flops.items():
                speeds[dtype] = max(flops, speeds.get(dtype, 0.0))
        peers = tuple(
            replace(advert, device=replace(advert.device, flops=best[_kind(advert)]))
            for advert in self.peers
        )
        return replace(self, peers=peers)

    def is_even(self, dtype: str) -> bool:
        """Whether no machine is clearly faster than another."""
        speeds = [advert.device.flops.get(dtype, 0.0) for advert in self.peers]
        return not speeds or max(speeds) <= EVEN * min(speeds)


@dataclass(frozen=True)
class ImproveRequest:
    """Look for a better placement of a running job than `plan`."""

    swarm: Swarm
    facts: ModelFacts
    job: PlacedJob
    plan: Plan
    serves: bool
    """Whether the steps are done and only conversations run."""
    calm_s: float
    """Seconds that a new placement may hope to last."""


@dataclass(frozen=True)
class Improvement:
    """The best placement that was found, beside what runs now."""

    decision: Decision
    current_s: float | None
    """The running plan by the same cost; None if it cannot be priced any more."""
    move_s: float
    """Seconds to fetch the state that must move."""


@dataclass(frozen=True)
class GridRequest:
    """Decide what a job leaves open of its grid, for the machines that are here."""

    swarm: Swarm
    facts: ModelFacts
    job: OpenJob


@dataclass(frozen=True)
class Refused:
    """The machines cannot do it; `reason` says in one line what is missing."""

    reason: str


Request = ImproveRequest | GridRequest
Answer = Improvement | PlacementConfig | Refused
