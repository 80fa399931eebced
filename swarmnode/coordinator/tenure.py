"""This node's right to coordinate one job: what it shows to workers, and how it wins it."""

from pathlib import Path

from swarmnode.domain import Generation, JobId, PeerId, Plan
from swarmnode.home import write_durably
from swarmnode.messages import Answer, Inquire
from swarmnode.p2p.identity import verify
from swarmnode.p2p.lease import Lease, Sign, vote_text


class Tenure:
    """A lease on disk, and the votes for the next election. Raises: ProtocolError, OSError."""

    def __init__(self, path: Path, job: JobId, submitter: PeerId, me: PeerId, sign: Sign) -> None:
        self._path = path
        self._job = job
        self._submitter = submitter
        self._me = me
        self._sign = sign
        self._lease = Lease.decode(path.read_bytes()) if path.exists() else Lease()
        self._holder, _ = self._lease.holder(job, submitter)
        self._votes: dict[Generation, dict[PeerId, bytes]] = {}

    def heard(self, peer: PeerId, answer: Answer) -> None:
        """Keep a vote for us, if it is one."""
        text = vote_text(self._job, answer.generation, self._me)
        if answer.granted and answer.vote and verify(peer, text, answer.vote):
            self._votes.setdefault(answer.generation, {})[peer] = answer.vote

    def shown(self, inquire: Inquire) -> bytes:
        """What goes with a question: the votes for it too, once they are enough. Somebody who was
        away when our voters were appointed knows us by nothing else."""
        return (self._won(inquire.generation) if inquire.is_agreed else self._lease).encode()

    def begun(self, plan: Plan) -> bytes:
        """What goes with the assignments of `plan`, which a majority has agreed to; on disk."""
        if self._holder != self._me:
            self._lease, self._holder = self._won(plan.generation), self._me
        if self._lease.appointment is None or self._lease.appointment.generation < plan.generation:
            self._lease = self._lease.appoint(self._job, plan.generation, plan.voters, self._sign)
            write_durably(self._path, self._lease.encode())
        self._votes.clear()
        return self._lease.encode()

    def _won(self, generation: Generation) -> Lease:
        """The lease with our election. Who is the holder anyhow needs none, but who follows another
        that lives yields to nothing less."""
        votes = self._votes.get(generation, {})
        if self._holder == self._me and not self._lease.is_majority(votes):
            return self._lease
        return self._lease.won(self._submitter, generation, self._me, votes)
