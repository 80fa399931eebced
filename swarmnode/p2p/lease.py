"""Why somebody else than its submitter may coordinate a job: a chain of elections, each signed.

The submitter coordinates first. Whoever coordinates appoints the voters of its newest generation
with its signature; a majority of those elects a successor for a later one, each with its own.
A lease is the chain of the elections that led to its holder and the newest appointment; anybody
who knows the submitter can check it. Whoever checks it may know nothing else, so no link can be
missing; but who was elected before needs only what made it a holder first to appoint voters again.
So the chain grows with the machines that ever coordinated, not with the elections.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from swarmnode.domain import Generation, JobId, PeerId
from swarmnode.errors import ProtocolError
from swarmnode.fields import MAX_LEASE_BYTES, Fence
from swarmnode.p2p.identity import verify

MAX_ELECTIONS = 1000
"""So many by four of seven voters each fit `MAX_LEASE_BYTES`."""
_PLAIN_BYTES = 1 << 16
"""Up to here a lease is plain JSON, as older versions wrote it and read it."""
_TEXT_BYTES = 3 << 19
"""A longer one is compressed; this is the most that it may come to."""
_LINE_BYTES = 1 << 13
"""One election of it: 16 voters with 16 votes fit."""
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

    @property
    def majority(self) -> int:
        """How many voters elect."""
        return len(set(self.voters)) // 2 + 1

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
        if self.generation <= self.appointment.generation:
            return False
        voters = set(self.appointment.voters)
        text = vote_text(job, self.generation, self.holder)
        agreed = (
            peer
            for peer, signature in self.votes.items()
            if peer in voters and verify(peer, text, bytes.fromhex(signature))
        )
        majority = self.appointment.majority
        return len(list(islice(agreed, majority))) == majority


@dataclass(frozen=True)
class Lease:
    """Everything that a coordinator can show."""

    __pydantic_config__ = _CLOSED

    elections: Annotated[tuple[Election, ...], Field(max_length=MAX_ELECTIONS)] = ()
    appointment: Appointment | None = None
    """By the last holder, or by the submitter."""

    def encode(self) -> bytes:
        """JSON; where that is long, a line for each election and the appointment, compressed."""
        text = _json(asdict(self))
        if len(text) <= _PLAIN_BYTES:
            return text
        appointment = None if self.appointment is None else asdict(self.appointment)
        return zlib.compress(b"\n".join(map(_json, (*map(asdict, self.elections), appointment))))

    @staticmethod
    def decode(data: bytes) -> "Lease":
        """What `encode` wrote.

        Bound: takes at most 8 MiB, a line parsed at a time, whatever is in `data`.
        Raises: ProtocolError for anything that `encode` cannot have written.
        """
        if not data:
            return Lease()
        is_plain = data.startswith(b"{")
        if len(data) > (_PLAIN_BYTES if is_plain else MAX_LEASE_BYTES):
            raise ProtocolError("a lease that is too long")
        try:
            return _LEASE.validate_json(data) if is_plain else _of_lines(_decompressed(data))
        except (ValidationError, RecursionError, zlib.error) as error:
            raise ProtocolError(f"not a lease: {error!s:.200}") from None

    def last_holder(self, submitter: PeerId) -> PeerId:
        """Who coordinates if the lease is genuine, which nothing here has checked."""
        return self.elections[-1].holder if self.elections else submitter

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

    def is_majority(self, votes: Iterable[PeerId]) -> bool:
        """Whether these are enough of the voters that were appointed last, if any were."""
        last = self.appointment
        return last is not None and len(set(last.voters).intersection(votes)) >= last.majority

    def won(
        self,
        submitter: PeerId,
        generation: Generation,
        holder: PeerId,
        votes: Mapping[PeerId, bytes],
    ) -> "Lease":
        """The chain with one election more: genuine `votes`, of voters of the appointment so far.

        Of the elections before, those are left out that came between two of the last holder, or
        after the submitter if it is that again: it might appoint voters without them. Of the votes
        a bare majority is kept.
        """
        assert self.appointment is not None
        agreed = [voter for voter in dict.fromkeys(self.appointment.voters) if voter in votes]
        kept = {voter: votes[voter].hex() for voter in agreed[: self.appointment.majority]}
        holders = [submitter, *(election.holder for election in self.elections)]
        needed = self.elections[: holders.index(self.last_holder(submitter))]
        return Lease((*needed, Election(self.appointment, generation, holder, kept)), None)


def vote_text(job: JobId, generation: int, holder: PeerId) -> bytes:
    """What a voter signs."""
    return json.dumps(["swarmnode vote", job, generation, holder]).encode()


def _appointment_text(job: JobId, generation: int, voters: tuple[PeerId, ...]) -> bytes:
    return json.dumps(["swarmnode voters", job, generation, list(voters)]).encode()


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def _decompressed(data: bytes) -> bytes:
    unpacking = zlib.decompressobj()
    text = unpacking.decompress(data, _TEXT_BYTES)
    if not unpacking.eof or unpacking.unused_data:
        raise ProtocolError("a lease that is torn or too long")
    return text


def _of_lines(text: bytes) -> Lease:
    *rows, last = text.split(b"\n", MAX_ELECTIONS)
    if max(map(len, (*rows, last))) > _LINE_BYTES:
        raise ProtocolError("a lease with an election that is too long")
    return Lease(tuple(map(_ELECTION.validate_json, rows)), _APPOINTMENT.validate_json(last))


_LEASE = TypeAdapter(Lease)
_ELECTION = TypeAdapter(Election)
_APPOINTMENT: TypeAdapter[Appointment | None] = TypeAdapter(Appointment | None)
