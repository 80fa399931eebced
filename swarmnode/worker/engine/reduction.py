"""The reduction of one step on one node: shares out, sums of the owned shards, reduced bytes in."""

from torch import Tensor

from swarmnode.compression.codec import Codec, Payload
from swarmnode.domain import BlobRef, SlotId
from swarmnode.failpoints import hit
from swarmnode.fields import Losses
from swarmnode.messages import Frame, FrameKind
from swarmnode.worker.engine.ports import Post
from swarmnode.worker.engine.setup import Setup
from swarmnode.worker.training.fingerprint import sum_of_squares
from swarmnode.worker.training.groups import Group
from swarmnode.worker.training.reduce import (
    ReducedGradient,
    ShardCodecs,
    ShardSum,
    check_norms,
    encode_shards,
)
from swarmnode.worker.training.residuals import Sent


class Reduction:
    """Everything between a slot's last backward and its stage's whole summed gradient."""

    def __init__(self, setup: Setup, step: int, post: Post) -> None:
        self._setup = setup
        self._step = step
        self._post = post
        self._codecs = codecs = ShardCodecs(setup.gradient, step)
        self._groups = setup.expected.groups
        self._sums = {
            (index, part): ShardSum(group, part, codecs, setup.device)
            for index, group in self._groups.items()
            for part in range(group.num_parts)
            if setup.is_hosted(group.owner(part))
        }
        self._reduced = {
            index: ReducedGradient(group, codecs, setup.reduced[index].flat)
            for index, group in self._groups.items()
        }
        self._payloads: dict[tuple[int, int], Payload] = {}
        """The reduced shards as they came, by group and part."""
        self._squares: dict[int, float] = {}
        self._by_slot: dict[SlotId, Losses] = {}
        self._losses: Losses = ()
        self._logged: dict[int, BlobRef] = {}

    def share(self, slot: SlotId, losses: Losses) -> None:
        """Send a finished slot's share of every shard of its groups to the shard's owner.

        Of gathered groups, to everybody who holds the stage.
        """
        for index, gradient in self._setup.accumulators[slot].items():
            group = self._groups[index]

            def encode(part: int, values: Tensor, index: int = index) -> Payload:
                return self._encode(Sent("share", slot, index, part), values)

            for part, payload in encode_shards(group, slot, gradient.flat, encode):
                if group.is_gathered:
                    self._broadcast(slot, index, part, payload, losses)
                    continue
                owner, shape = group.owner(part), self._shape(index, part)
                frame = self._setup.frame(
                    "gradient", self._step, slot, owner, shape,
                    group=index, part=part, losses=losses,
                )  # fmt: skip
                self._post(frame, payload)

    def take(self, frame: Frame, payload: Payload) -> None:
        """Take a share of an owned shard, or a reduced shard.

        Raises: FrameError if it does not decode, ShareError for a share that is implausible.
        """
        meter, group, part = self._setup.meter, self._groups[frame.group], frame.part
        name = self._name(self._codecs.of(group, part))
        if frame.kind == "reduced":
            reduced = self._reduced[frame.group]
            meter.decode("reduced", name, lambda: reduced.take(part, payload))
            self._payloads[frame.group, frame.part] = payload
            if group.is_gathered:
                self._gathered(frame)
            else:
                self._losses = frame.losses or self._losses
            return
        if frame.losses:
            self._by_slot[frame.source] = frame.losses
        shares = self._sums[frame.group, part]
        total = meter.decode("gradient", name, lambda: shares.add(frame.source, payload))
        if total is None:
            return
        del self._sums[frame.group, frame.part]
        coded = self._encode(Sent("sum", frame.target, frame.group, frame.part), total)
        losses = self._losses_of(group)
        self._broadcast(frame.target, frame.group, frame.part, coded, losses)

    def _broadcast(
        self, source: SlotId, index: int, part: int, payload: Payload, losses: Losses
    ) -> None:
        shape = self._shape(index, part)
        for receiver in self._groups[index].receivers(self._setup.plan):
            answer = self._setup.frame(
                "reduced", self._step, source, receiver, shape,
                group=index, part=part, losses=losses,
            )  # fmt: skip
            self._post(answer, payload)
            hit("mid_tensor", self._step)

    def _gathered(self, frame: Frame) -> None:
        """A slot's own part has come: everybody judges what all have, as an owner does."""
        group = self._groups[frame.group]
        if frame.losses:
            self._by_slot[frame.source] = frame.losses
            self._losses = self._losses_of(group)
        for norms in self._reduced[frame.group].norms.values():
            if len(norms) == len(group.members):
                check_norms(norms)

    def _losses_of(self, group: Group) -> Losses:
        members = [member for member in group.members if member in self._by_slot]
        return tuple(loss for member in members for loss in self._by_slot[member])

    def is_complete(self, stage: int) -> bool:
        """Whether all reduced shards of all groups of a stage are here."""
        indices = self._setup.stage_groups[stage].indices
        return all(self._reduced[index].is_complete for index in indices)

    def log(self, stage: int) -> BlobRef:
        """Put the stage's update, as it was broadcast, into its log. Raises: DataError."""
        if stage not in self._logged:
            payloads = [
                self._payloads[index, part]
                for index in self._setup.stage_groups[stage].indices
                for part in range(self._groups[index].num_parts)
            ]
            update = self._setup.logs[stage].write(self._step, payloads)
            self._setup.residuals.logged(stage, self._step, update)
            if self._setup.local is not None:
                self._setup.local.logged(stage, self._step, update)
            self._logged[stage] = update
            if len(self._logged) == len(self._setup.stage_groups):
                self._payloads.clear()  # tied ends share a group: not before both have it
        return self._logged[stage]

    def losses(self, stage: int) -> Losses:
        """Of all microbatches of the step, slot by slot; empty except at the last stage."""
        return self._losses if stage == self._setup.plan.num_stages - 1 else ()

    def sums_of_squares(self, stage: int) -> tuple[tuple[int, float], ...]:
        """(group, sum of squares) of each of the stage's groups, before any clipping."""
        indices = self._setup.stage_groups[stage].indices
        for index in indices:
            if index not in self._squares:
                self._squares[index] = sum_of_squares(self._setup.reduced[index].flat)
        return tuple((index, self._squares[index]) for index in indices)

    def apply(self, scale: float) -> None:
        """Scale the summed gradients and update every stage that is held."""
        setup = self._setup
        for gradient in setup.reduced.values():
            gradient.flat.mul_(scale)
        for stage, state in setup.stages.items():
            views = {
                name: view
                for index in setup.stage_groups[stage].indices
                for name, view in setup.reduced[index].views.items()
            }
            state.apply(views, num_steps=setup.manifest.num_steps)
        setup.residuals.committed(self._step)
        if setup.local is not None:
            setup.local.committed(self._step)
        if setup.deltas is not None:
            setup.deltas.commit()

    def state_hash(self, stage: int) -> str:
        return self._setup.stages[stage].state_hash()

    def _encode(self, key: Sent, values: Tensor) -> Payload:
        """Code what is sent; with error feedback, also what is owed of the steps before."""
        setup, step = self._setup, self._step
        codec = self._codecs.of(self._groups[key.group], key.part)
        is_share = key.kind == "share" and not self._groups[key.group].is_gathered
        kind: FrameKind = "gradient" if is_share else "reduced"
        if setup.gradient.memory == "feedback":
            residuals = setup.residuals
            return setup.meter.encode(
                kind, self._name(codec), values,
                lambda: residuals.encode(key, values, codec, step), lambda _: residuals.lost(key),
            )  # fmt: skip
        return setup.meter.encode(
            kind, self._name(codec), values, lambda: codec.encode(values),
            lambda coded: values - codec.decode(coded, values.shape, device=values.device),
        )  # fmt: skip

    def _name(self, codec: Codec) -> str:
        return f"{codec.spec}+ef" if self._setup.gradient.memory == "feedback" else codec.spec

    def _shape(self, index: int, part: int) -> tuple[int]:
        start, stop = self._groups[index].shard(part)
        return (stop - start,)
