"""Why somebody else than its submitter may coordinate a job: a chain of elections, each signed.

The submitter coordinates first. Whoever coordinates appoints the voters of its newest generation
with its signature; a majority of those elects a successor for a later one, each with its own.
A lease is the chain of the elections so far and the newest appointment; anybody who knows the
submitter can check it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from swarmnode.domain import Generation, JobId, PeerId
from swarmnode.errors import ProtocolError
from swarmnode.fields import Fence
from swarmnode.p2p.identity import verify

MAX_LEASE_BYTES = 1 << 16
MAX_ELECTIONS = 64
_Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
_Peer = Annotated[PeerId, Field(min_length=1, max_length=128)]
_CLOSED = ConfigDict(extra="forbid")
Sign = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Appointment:
    """Who may elect a successor, by the word of the coordinator of `generation`."""

    __pydantic_config__ = _CLOSED

    generation: Fence
    voters: Annotated[tuple[_Peer, ...], Field(min_length=1, max_length=16)]
    signature: _Signature

    @staticmethod
    def make(
        job: JobId, generation: Generation, voters: tuple[PeerId, ...], sign: Sign
    ) -> "Appointment":
        text = _appointment_text(job, generation, voters)
        return Appointment(generation, voters, sign(text).hex())

    def is_by(self, coordinator: PeerId, job: JobId) -> bool:
        text = _appointment_text(job, self.generation, self.voters)
        return verify(coordinator, text, bytes.fromhex(self.signature))


@dataclass(frozen=True)
class Election:
    """A majority of the voters of an appointment lets `holder` begin `generation`."""

    __pydantic_config__ = _CLOSED

    appointment: Appointment
    generation: Fence
    holder: _Peer
    votes: Annotated[dict[_Peer, _Signature], Field(max_length=16)]

    def is_valid(self, job: JobId) -> bool:
        voters = set(self.appointment.voters)
        text = vote_text(job, self.generation, self.holder)
        agreed = [
            peer
            for peer, signature in self.votes.items()
            if peer in voters and verify(peer, text, bytes.fromhex(signature))
        ]
        return self.generation > self.appointment.generation and 2 * len(agreed) > len(voters)


@dataclass(frozen=True)
class Lease:
    """Everything that a coordinator can show."""

    __pydantic_config__ = _CLOSED

    elections: Annotated[tuple[Election, ...], Field(max_length=MAX_ELECTIONS)] = ()
    appointment: Appointment | None = None
    """By the last holder, or by the submitter."""

    def encode(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True).encode()

    @staticmethod
    def decode(data: bytes) -> "Lease":
        """Raises: ProtocolError for anything that `encode` cannot have written."""
        if not data:
            return Lease()
        if len(data) > MAX_LEASE_BYTES:
            raise ProtocolError("a lease that is too long")
        try:
            return _LEASE.validate_json(data)
        except (ValidationError, RecursionError) as error:
            raise ProtocolError(f"not a lease: {error!s:.200}") from None

    def holder(self, job: JobId, submitter: PeerId) -> tuple[PeerId, Generation]:
        """Who coordinates by this lease, and from which generation on.

        Raises: ProtocolError if some election, or the appointment before it, is not genuine.
        """
        holder, since = submitter, Generation(0)
        for election in self.elections:
            is_genuine = election.appointment.is_by(holder, job) and election.is_valid(job)
            if not is_genuine or election.appointment.generation < since:
                raise ProtocolError("a lease with an election that did not happen")
            holder, since = election.holder, election.generation
        if self.appointment is not None and not self.appointment.is_by(holder, job):
            raise ProtocolError("a lease with voters that its holder did not appoint")
        return holder, since

    def appoint(
        self, job: JobId, generation: Generation, voters: tuple[PeerId, ...], sign: Sign
    ) -> "Lease":
        """The same chain, with the voters of a new generation."""
        return Lease(self.elections, Appointment.make(job, generation, voters, sign))

    def won(self, generation: Generation, holder: PeerId, votes: Mapping[PeerId, bytes]) -> "Lease":
        """The chain with one election more: `votes` by voters of the appointment so far."""
        assert self.appointment is not None
        signed = {peer: vote.hex() for peer, vote in votes.items() if len(vote) == 64}
        election = Election(self.appointment, generation, holder, signed)
        return Lease((*self.elections, election), None)


def vote_text(job: JobId, generation: int, holder: PeerId) -> bytes:
    """What a voter signs."""
    return json.dumps(["swarmnode vote", job, generation, holder]).encode()


def _appointment_text(job: JobId, generation: int, voters: tuple[PeerId, ...]) -> bytes:
    return json.dumps(["swarmnode voters", job, generation, list(voters)]).encode()


_LEASE = TypeAdapter(Lease)
