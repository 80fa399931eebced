"""What is said on a control stream only so that nobody is taken for dead."""

from dataclasses import dataclass

from swarmnode.domain import JobId


@dataclass(frozen=True)
class Ping:
    """Sent every heartbeat by both sides; silence means death."""

    job: JobId


@dataclass(frozen=True)
class Checking:
    """What is on this node's disk is read before its answer; said every heartbeat until then."""

    job: JobId
