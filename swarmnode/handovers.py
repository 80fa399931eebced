"""What is said about who goes, and about who goes on."""

from dataclasses import dataclass

from swarmnode.domain import JobId, PeerId
from swarmnode.fields import Count, Fence


@dataclass(frozen=True)
class Leaving:
    """This life of a node wants to end soon: do without it; said again until it is let go."""

    job: JobId
    generation: Fence
    incarnation: Count


@dataclass(frozen=True)
class StandingBy:
    """A standby has all that it needs to coordinate the job itself."""

    job: JobId
    generation: Fence


@dataclass(frozen=True)
class HandOver:
    """Said by a coordinator that leaves, to all: whoever hears it is free to promise itself, and
    `heir` stands for election at once."""

    job: JobId
    generation: Fence
    heir: PeerId
