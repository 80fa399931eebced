"""What every job on a node shares, and where the rest of the node hooks in."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from swarmnode.codings import Coding
from swarmnode.domain import JobId, PeerId, Plan
from swarmnode.messages import (
    Inquire,
    LinkReport,
)
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.blobs import BlobClient
from swarmnode.p2p.switch import Switch
from swarmnode.worker.nursery import Nursery
from swarmnode.worker.tenancy import VerifyLease, is_voter


async def _ignore_entry(_job: JobId, _number: int, _lines: bytes) -> None: ...
def _ignore_log(_event: str, **_facts: object) -> None: ...
def _ignore_job(_job: JobId) -> None: ...
def _ignore_plan(_job: JobId, _plan: Plan) -> None: ...
def _no_vote(_inquire: Inquire, _sender: PeerId) -> bytes:
    return b""


async def _no_lines(_job: JobId) -> int:
    return 0


def _ignore_codings(_codings: Iterable[Coding]) -> None:
    return


@dataclass(frozen=True)
class HostTools:
    """One for each node."""

    me: PeerId
    incarnation: int
    """Of this life of the node, as its advert says."""
    directory: Path
    """Where jobs keep their files, one folder each."""
    store: BlobStore
    blobs: BlobClient
    switch: Switch
    device: str
    num_threads: int
    nursery: Nursery
    child_hang_s: float
    """Seconds after which a child that does not answer is ended."""
    on_sent: Callable[[str, int], None]
    on_compute: Callable[[float], None]
    on_coded: Callable[[Iterable[Coding]], None] = _ignore_codings
    trace_directory: str = ""
    """Where worker children write where their time goes; empty for nowhere."""
    log: Callable[..., None] = _ignore_log
    links: Callable[[], tuple[LinkReport, ...]] = tuple
    """What this node has measured of its links."""
    verify_lease: VerifyLease = is_voter
    """Whether a peer other than the submitter may begin a generation."""
    vote: Callable[[Inquire, PeerId], bytes] = _no_vote
    """Our signature under a promise."""
    on_entry: Callable[[JobId, int, bytes], Awaitable[None]] = _ignore_entry
    """Takes lines of a job's journal, the first with its number."""
    num_lines: Callable[[JobId], Awaitable[int]] = _no_lines
    """How many lines of a job's journal this node has."""
    on_orphaned: Callable[[JobId], None] = _ignore_job
    """The stream of a job's coordinator broke; nobody has taken over yet."""
    on_named: Callable[[JobId], None] = _ignore_job
    """A job's coordinator leaves, and this node is to go on; the stream ends next."""
    on_followed: Callable[[JobId], None] = _ignore_job
    """Somebody who coordinates a job, or may, talks to us from now on."""
    on_adopted: Callable[[JobId, Plan], None] = _ignore_plan
    """A plan was adopted: its coordinator talks to us."""
