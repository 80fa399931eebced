"""The error tree. A class exists only where a caller acts differently on it.

SwarmError
|-- UserError                bad input: print the one line, exit 2
|   |-- ManifestError        a job file or manifest cannot be used
|   |-- DataError            missing, empty or unfit data, tokenizer or model folder
|   |-- BusyError            a home, a port or a job is in use by somebody else
|   |-- CapacityError        too few peers or too little memory; may be retried later
|   |-- AuthError            wrong or stale token
|   `-- NotFoundError        no such job, peer or model
|-- PeerError                somebody else's fault: reroute
|   |-- PeerLostError        unreachable, silent or gone; never retry the same connection
|   |-- RefusedError         the peer answered "no"; do not repeat the request
|   |-- SlotError            a slot sent what cannot be used: it loses its slots
|   |   |-- FrameError           a tensor that does not decode
|   |   `-- ShareError           a gradient that cannot be
|   `-- ProtocolError        the peer broke the protocol: drop it and count
|       `-- FrameTooLargeError   announced more bytes than allowed; nothing was allocated
|-- CodecError               bytes that do not decode to the tensor that was announced
|   |-- HistoryError         a change of something else than is held: begin without history
|   `-- NotFiniteError       a tensor that cannot be coded: perhaps all diverge
|-- ChunkError               content does not match its hash: take it from another peer
`-- ChildError               a child process of ours failed; it may be restarted
"""

from dataclasses import dataclass


class SwarmError(Exception):
    """Anything that can go wrong in the world; our own bugs are assertions instead."""


class UserError(SwarmError):
    """Bad input. The text is one line that says what is wrong and what to do."""


class ManifestError(UserError):
    """A job file or manifest has an unknown key or an impossible value."""


class DataError(UserError):
    """Data, a tokenizer or a model folder is missing, empty or does not fit."""


class BusyError(UserError):
    """A home, port or name is in use by another process."""


class CapacityError(UserError):
    """The swarm is too small for the job as it is now; more peers may join."""


class AuthError(UserError):
    """The token is missing, wrong or stale."""


class NotFoundError(UserError):
    """There is no such job, peer or model."""


class PeerError(SwarmError):
    """Something that another peer did or failed to do."""


@dataclass(eq=False)
class PeerLostError(PeerError):
    """A peer cannot be reached or a stream broke. Reroute; open a new stream to try again."""

    peer: str
    reason: str

    def __str__(self) -> str:
        return f"peer {self.peer} lost: {self.reason}"


@dataclass(eq=False)
class RefusedError(PeerError):
    """A peer answered "no". Do not repeat the same request."""

    peer: str
    reason: str

    def __str__(self) -> str:
        return f"peer {self.peer} refused: {self.reason}"


@dataclass(eq=False)
class SlotError(PeerError):
    """What a slot sent cannot be used. Report the slot."""

    stage: int
    slot: int
    reason: str
    is_finite: bool = True
    """False where a value is not: perhaps it is training that diverges."""
    is_mismatch: bool = False
    """True for a `HistoryError`: perhaps it is what is held here that is wrong."""


class FrameError(SlotError):
    """A slot's tensor does not decode, or is not finite."""

    def __str__(self) -> str:
        return f"tensor of stage {self.stage}, slot {self.slot}: {self.reason}"


class ShareError(SlotError):
    """A slot's gradient is not finite or implausible; it was not summed."""

    def __str__(self) -> str:
        return f"gradient of stage {self.stage}, slot {self.slot} {self.reason}; it was not summed"


class ProtocolError(PeerError):
    """A peer sent bytes that break the protocol: close its stream and count it."""


@dataclass(eq=False)
class FrameTooLargeError(ProtocolError):
    """A message announced more bytes than its stream allows. Nothing was allocated."""

    num_bytes: int
    max_bytes: int

    def __str__(self) -> str:
        return f"message of {self.num_bytes} bytes announced, at most {self.max_bytes} allowed"


class CodecError(SwarmError):
    """A payload is not what its announced codec, shape and dtype say. Drop the frame."""


class HistoryError(CodecError):
    """A change does not follow from what is held here; either end's history may be wrong."""


class NotFiniteError(CodecError):
    """A value to be coded is not finite: training has diverged, or a device is broken."""


class ChunkError(SwarmError):
    """Content does not match its hash. Take it from another peer."""


class ChildError(SwarmError):
    """A child process of ours failed or ended. Report it; it may be started again."""
