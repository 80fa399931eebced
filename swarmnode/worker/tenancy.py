"""To whom a worker has promised a job, and whom it obeys: fencing, decided purely.

A promise is a vote: it is durable before it is told, and it never goes down. Nothing of a
generation below it is served any more, so of two coordinators at most one gets a majority.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from swarmnode.domain import Generation, JobId, PeerId, Plan
from swarmnode.errors import DataError, ProtocolError
from swarmnode.fields import Fence
from swarmnode.messages import (
    Assign,
    Inquire,
)
from swarmnode.p2p.lease import Lease

ORPHAN_S = 600.0
"""How long child and state wait for a coordinator; the files stay longer."""
HEIR_PATIENCE_S = 16.0
"""Whom a leaving coordinator has named is awaited so long by who leaves too: if that one fails, the
next stands after 11 s, and needs votes."""
VerifyLease = Callable[["Tenancy", bytes, PeerId, Generation], bool]
"""Whether a lease lets this peer begin this generation of the job."""


def is_voter(tenancy: "Tenancy", _lease: bytes, sender: PeerId, _generation: Generation) -> bool:
    """Let those begin a generation whom the last plan named to succeed its coordinator, or who
    were named before: the last plan may never have begun."""
    plan = tenancy.plan
    return plan is not None and sender in (*plan.voters, *plan.voters_before)


def may_coordinate(
    tenancy: "Tenancy", lease: bytes, sender: PeerId, generation: Generation
) -> bool:
    """Let those begin a generation who may succeed our coordinator, or show that they did."""
    if is_voter(tenancy, lease, sender, generation):
        return True
    since = elected_since(tenancy, lease, sender)
    return since is not None and since <= generation


def elected_since(tenancy: "Tenancy", lease: bytes, sender: PeerId) -> Generation | None:
    """From which generation on the lease makes `sender` the coordinator; None if it does not."""
    try:
        shown = Lease.decode(lease)
        if shown.last_holder(tenancy.submitter) != sender:
            return None  # somebody else's: anybody could have it checked again and again
        holder, since = shown.holder(tenancy.job, tenancy.submitter)
    except ProtocolError:
        return None
    return since if holder == sender else None


@dataclass(frozen=True)
class Tenancy:
    """What one worker has promised about one job. Every change is a new value."""

    job: JobId
    submitter: PeerId
    promised: Generation
    promised_to: PeerId
    plan: Plan | None = None
    """The last plan that was adopted."""
    lease: bytes = b""
    """What its coordinator showed for it."""
    is_released: bool = False
    """Whether we have no part in the job any more; what was promised holds all the same."""
    is_over: bool = False
    """Whether the job has ended: nobody is promised anything any more."""

    @staticmethod
    def fresh(job: JobId, submitter: PeerId) -> "Tenancy":
        """Before anybody has asked: the submitter may begin."""
        return Tenancy(job, submitter, Generation(0), submitter)

    @property
    def adopted(self) -> Generation:
        """The generation of the last plan that was adopted."""
        return Generation(0) if self.plan is None else self.plan.generation

    @property
    def coordinator(self) -> PeerId:
        """Whom this worker obeyed last."""
        return self.submitter if self.plan is None else self.plan.coordinator

    def may_ask(
        self, message: Inquire | Assign, sender: PeerId, verify_lease: VerifyLease = is_voter
    ) -> bool:
        """Whether `sender` has any right to begin a generation; a stranger's message is refused."""
        is_known = sender in (self.submitter, self.coordinator)
        generation = _generation(message)
        return is_known or verify_lease(self, message.lease, sender, generation)

    def is_deposed_by(self, inquire: Inquire, sender: PeerId) -> bool:
        """Whether `sender` shows that a majority has elected it for this very generation: then the
        plan of our coordinator never began, and never will, though it talks to us still."""
        if not inquire.is_agreed:
            return False
        return elected_since(self, inquire.lease, sender) == inquire.generation

    def on_inquire(
        self, inquire: Inquire, sender: PeerId, coordinator_is_live: bool, num_lines: int = 0
    ) -> "Tenancy | None":
        """The tenancy with the promise that is asked for, or None where it is not granted.

        `coordinator_is_live`: whether a control stream with `coordinator` is open now, and it may
        go on still.
        `num_lines`: lines of the job's journal that this node has; who has fewer would forget.
        What a majority has granted already makes void whatever else is known: no plan that was
        adopted meanwhile can begin any more.
        """
        if self.is_over:
            return None
        generation = inquire.generation
        is_same = generation == self.promised > self.adopted and sender == self.promised_to
        if not (generation > self.promised or is_same) or inquire.based_on < self.adopted:
            return None
        would_forget = inquire.num_lines < num_lines and not inquire.is_agreed
        if would_forget and sender != self.coordinator:
            return None
        if sender != self.coordinator and coordinator_is_live:
            return None
        return replace(self, promised=generation, promised_to=sender)

    def on_assign(self, assign: Assign, sender: PeerId) -> "Tenancy | None":
        """The tenancy that has adopted the plan, or None where it may not.

        That is the generation promised to `sender`, or a later one by the coordinator that this
        worker obeys anyhow. One that is adopted already is not carried out again: steps were
        committed since, and it would take the states back to before them.
        """
        plan = assign.plan
        if plan.coordinator != sender or self.is_over:
            return None
        if plan.generation == self.promised:
            may = sender == self.promised_to and plan.generation > self.adopted
        else:
            obeyed = sender == self.coordinator and self.promised_to == sender
            may = plan.generation > self.promised and obeyed
        if not may:
            return None
        return replace(
            self,
            promised=plan.generation,
            promised_to=sender,
            plan=plan,
            lease=assign.lease,
            is_released=False,
        )

    def accepts(self, generation: int) -> bool:
        """Whether messages and frames of `generation` are served still."""
        return generation >= self.promised

    def obeys(self, sender: PeerId) -> bool:
        """Whether `sender` is the one to whom the job is promised."""
        return sender == self.promised_to

    def names(self, peer: PeerId) -> bool:
        """Whether `peer` has business with this job, as far as this worker knows."""
        named = self.plan is not None and (self.plan.names(peer) or peer in self.plan.voters)
        return named or peer in (self.submitter, self.promised_to)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {
            "job": self.job,
            "submitter": self.submitter,
            "promised": self.promised,
            "promised_to": self.promised_to,
            "plan": None if self.plan is None else _PLAN.dump_python(self.plan, mode="json"),
            "lease": self.lease.hex(),
            "released": self.is_released,
            "over": self.is_over,
        }

    @staticmethod
    def from_json(raw: Any) -> "Tenancy":
        """Raises: DataError for anything that `to_json` cannot have written."""
        try:
            plan = None if raw["plan"] is None else _PLAN.validate_json(json.dumps(raw["plan"]))
            return Tenancy(
                job=JobId(_TEXT.validate_python(raw["job"])),
                submitter=PeerId(_TEXT.validate_python(raw["submitter"])),
                promised=_FENCE.validate_python(raw["promised"]),
                promised_to=PeerId(_TEXT.validate_python(raw["promised_to"])),
                plan=plan,
                lease=bytes.fromhex(raw["lease"]),
                is_released=raw["released"] is True,
                is_over=raw.get("over") is True,
            )
        except (KeyError, TypeError, ValueError, ValidationError) as error:
            raise DataError(f"not a tenancy: {error!s:.200}") from None


def _generation(message: Inquire | Assign) -> Generation:
    return message.generation if isinstance(message, Inquire) else message.plan.generation


_PLAN = TypeAdapter(Plan)
_FENCE: TypeAdapter[Generation] = TypeAdapter(Fence)
_TEXT = TypeAdapter(str)
