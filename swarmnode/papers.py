"""What whoever works for a job has in hand of it, and whoever takes it over needs."""

from dataclasses import dataclass

from swarmnode.domain import Plan
from swarmnode.manifest import Manifest


@dataclass(frozen=True)
class Papers:
    """A job that somebody coordinates, as its workers know it."""

    manifest: Manifest
    canonical: bytes
    """The manifest as it was signed."""
    signature: bytes
    """The submitter's, over `canonical`."""
    plan: Plan
    """The last one that was adopted."""
    lease: bytes
    """What its coordinator showed for it."""
