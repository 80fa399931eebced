"""The mean of one vector per slot, over real bytes, in two phases.

    exchange = averager.prepare(values_N)      what to send to whom
    replies = exchange.reduce(pushes)          owners: the means, once all pushes are here
    mean = exchange.receive(replies)           the mean, the same bits on every slot
    averager.commit()                          or rollback(): as if it had never begun

Nothing that lasts changes before `commit`. Two topologies: every slot owns a shard, sums it and
sends the mean to all (bytes up: about 2 (K - 1) / K of a vector); or each sends the whole to all,
who sum alike (K - 1 of a vector, which may be much smaller).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from swarmnode.compression.feedback import ErrorFeedback, Pending
from swarmnode.compression.sync.layout import Layout, Part
from swarmnode.compression.sync.messages import PUSH, REPLY, Envelope
from swarmnode.compression.sync.sums import checked_mean
from swarmnode.compression.tensors import Payload
from swarmnode.errors import CodecError
from swarmnode.sync_specs import Sync

MAX_ABSENCE = 8
"""Exchanges of a fragment that a slot or an owner may miss before what it owes is dropped."""


@dataclass(eq=False)
class _Sent:
    """A part that was coded: what to owe when everybody has it."""

    feedback: ErrorFeedback | None
    pending: Pending | None
    decoded: Tensor

    def commit(self) -> None:
        if self.feedback is not None and self.pending is not None:
            self.feedback.commit(self.pending, self.decoded)

    def rollback(self) -> None:
        if self.feedback is not None and self.pending is not None:
            self.feedback.rollback(self.pending)


@dataclass(eq=False)
class _Open:
    """The exchange that is under way."""

    push: Envelope
    sent: dict[Part, _Sent] = field(default_factory=dict)
    replied: dict[Part, _Sent] = field(default_factory=dict)


class Averager:
    """One slot's part in the means of a stage.

    What a contribution lacks is owed by its sender, what a reply lacks by the owner (`feedback`),
    to which the sum of all that was ever sent is true. A contribution that is rejected is lost:
    nobody owes it.
    """

    def __init__(self, sync: Sync, layout: Layout, slot: int) -> None:
        self.sync, self.layout, self.slot = sync, layout, slot
        self.num_exchanges = 0
        """That were committed."""
        self.num_rejected = 0
        """Contributions that this slot has left out of its sums."""
        self._feedback: dict[tuple[int, Part], ErrorFeedback] = {}
        self._open: _Open | None = None
        self._num_rejected_now = 0
        self._device = torch.device("cpu")
        """Where the values of the last exchange were: what comes is decoded there."""

    @property
    def fragment(self) -> int:
        """That of the next exchange, or of the one under way."""
        return self.num_exchanges % self.layout.num_fragments

    @property
    def parts(self) -> list[Part]:
        """Of this fragment."""
        return self.layout.parts_of(self.fragment)

    @property
    def _others(self) -> list[int]:
        return [slot for slot in range(self.layout.num_slots) if slot != self.slot]

    def _parts_for(self, owner: int) -> list[Part]:
        """What goes to a slot for it to sum."""
        return self.layout.parts_of(
            self.fragment, owner if self.sync.topology == "owners" else None
        )

    def prepare(self, values_N: Tensor, state: int = 0) -> dict[int, bytes]:
        """Code this slot's contribution of this fragment. What to send, by slot.

        `state` is the checksum of what the values are a difference to: all must have the same.
        Raises: CodecError if a value cannot be coded; then nothing is under way.
        """
        assert self._open is None, "one exchange at a time"
        push = Envelope(self.sync, self.layout, self.num_exchanges, state=state)
        self._open, self._device = _Open(push), values_N.device
        self._num_rejected_now = 0
        try:
            bodies = {
                part: self._code(push, part, values_N[part.start : part.stop], self._open.sent)
                for part in self.parts
            }
        except Exception:
            self.rollback()
            raise
        wanted = {slot: self._parts_for(slot) for slot in self._others}
        return {
            slot: push.seal(self.slot, [bodies[part] for part in parts])
            for slot, parts in wanted.items()
            if parts
        }

    def _code(
        self, envelope: Envelope, part: Part, values: Tensor, into: dict[Part, _Sent]
    ) -> bytearray:
        feedback = self._memory(envelope, part)
        pending = None if feedback is None else feedback.prepare(values, envelope.round)
        sent = into[part] = _Sent(feedback, pending, values)
        body = envelope.encode(part, values if pending is None else pending.tensor)
        sent.decoded = envelope.decode(part, body, values.device)
        return body

    def _memory(self, envelope: Envelope, part: Part) -> ErrorFeedback | None:
        is_reply = envelope.kind == REPLY
        memory, is_warm = self.sync.memory, self.num_exchanges >= self.sync.warmup
        if not is_warm or memory == "none" or (memory == "weights" and not is_reply):
            return None
        decay = 1.0 if is_reply else self.sync.decay
        return self._feedback.setdefault(
            (envelope.kind, part), ErrorFeedback(decay=decay, max_absence=MAX_ABSENCE)
        )

    def sent(self) -> dict[Part, Tensor]:
        """What the others have of this slot's contribution, decoded."""
        assert self._open is not None
        return {part: sent.decoded for part, sent in self._open.sent.items()}

    def reduce(self, pushes: Mapping[int, Payload]) -> dict[int, bytes]:
        """Sum this slot's shard; what to reply, by slot. Nothing where everyone sums.

        `pushes` are those that the step counts, by slot, without this slot's own.
        Raises: CodecError if a message is not what its slot must have sent: leave that slot out;
        or if the mean cannot be coded. What is owed is then as before: it may be tried again.
        """
        assert self._open is not None
        parts = self._parts_for(self.slot)
        if self.sync.topology != "owners" or not parts:
            return {}
        mean = self._mean(pushes, parts)
        envelope = replace(self._open.push, kind=REPLY)
        bodies, start = [], 0
        try:
            for part in parts:
                values = mean[start : start + part.size]
                bodies.append(self._code(envelope, part, values, self._open.replied))
                start += part.size
        except Exception:
            for sent in self._open.replied.values():
                sent.rollback()
            self._open.replied.clear()
            raise
        return dict.fromkeys(self._others, envelope.seal(self.slot, bodies))

    def _mean(self, pushes: Mapping[int, Payload], parts: list[Part]) -> Tensor:
        assert self._open is not None
        contributions = {self.slot: [self._open.sent[part].decoded for part in parts]}
        for slot, message in pushes.items():
            if slot not in self._others:
                raise CodecError(f"slot {slot} is none of the others in this exchange")
            values = self._open.push.open(slot, message, parts, self._device)
            contributions[slot] = [values[part] for part in parts]
        mean = checked_mean(contributions)
        self._num_rejected_now = len(mean.rejected)
        return mean.values

    def receive(self, messages: Mapping[int, Payload]) -> dict[Part, Tensor]:
        """The mean of this fragment, by part: from the owners' replies, or from all pushes.

        Of pushes, those that are given take part: all slots must be given the same.
        Raises: CodecError if a message is not what its slot must have sent, or a reply is missing.
        """
        assert self._open is not None
        if not self.parts:  # fewer pieces than fragments: this one is empty
            return {}
        if self.sync.topology != "owners":
            mean, result, start = self._mean(messages, self.parts), {}, 0
            for part in self.parts:
                result[part] = mean[start : start + part.size]
                start += part.size
            return result
        result = {part: sent.decoded for part, sent in self._open.replied.items()}
        owners = {slot for slot in self._others if self._parts_for(slot)}
        if set(messages) != owners:
            raise CodecError(f"replies of slots {sorted(messages)} instead of {sorted(owners)}")
        envelope = replace(self._open.push, kind=REPLY)
        for slot, message in sorted(messages.items()):
            parts = self._parts_for(slot)
            result.update(envelope.open(slot, message, parts, self._device))
        assert set(result) == set(self.parts), "reduce first"
        return {part: result[part] for part in self.parts}

    def commit(self) -> None:
        """Everybody has everything: what was lost is owed, the next exchange may begin."""
        for sent in self._end():
            sent.commit()
        self.num_exchanges += 1
        self.num_rejected += self._num_rejected_now

    def rollback(self) -> None:
        """Not everybody has it: all that lasts is, bit for bit, what it was before."""
        for sent in self._end():
            sent.rollback()

    def _end(self) -> list[_Sent]:
        assert self._open is not None, "no exchange under way"
        ended, self._open = self._open, None
        return [*ended.sent.values(), *ended.replied.values()]

    def residual(self, kind: int = PUSH) -> Tensor:
        """What this slot owes, as contributor or (REPLY) as owner; zeros where nothing."""
        owed_N = torch.zeros(self.layout.num_values, device=self._device)
        for (of, part), feedback in self._feedback.items():
            if of == kind and feedback.residual is not None:
                owed_N[part.start : part.stop] = feedback.residual
        return owed_N
