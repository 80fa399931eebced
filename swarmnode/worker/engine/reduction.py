"""The reduction of one step on one node: shares out, sums of the owned shards, reduced bytes in."""

from swarmnode.compression.codec import Payload
from swarmnode.domain import SlotId
from swarmnode.messages import Frame
from swarmnode.worker.engine.setup import Post, Setup
from swarmnode.worker.training.fingerprint import digest, sum_of_squares
from swarmnode.worker.training.reduce import ReducedGradient, ShardSum, encode_shards


class Reduction:
    """Everything between a slot's last backward and its stage's whole summed gradient."""

    def __init__(self, setup: Setup, step: int, post: Post) -> None:
        self._setup = setup
        self._step = step
        self._post = post
        self._codec = setup.codecs["gradient"]
        self._groups = setup.expected.groups
        self._sums = {
            (index, part): ShardSum(group, part, self._codec, setup.device)
            for index, group in self._groups.items()
            for part in range(group.num_parts)
            if setup.is_hosted(group.owner(part))
        }
        self._reduced = {
            index: ReducedGradient(group, self._codec, setup.reduced[index].flat)
            for index, group in self._groups.items()
        }
        self._squares: dict[int, float] = {}

    def share(self, slot: SlotId) -> None:
        """Send a finished slot's share of every shard of its groups to the shard's owner."""
        for index, gradient in self._setup.accumulators[slot].items():
            group = self._groups[index]
            for part, payload in encode_shards(group, self._codec, gradient.flat):
                owner, shape = group.owner(part), self._shape(index, part)
                frame = self._setup.frame(
                    "gradient", self._step, slot, owner, shape, group=index, part=part
                )
                self._post(frame, payload)

    def take(self, frame: Frame, payload: Payload) -> None:
        """Take a share of an owned shard, or a reduced shard. Raises: CodecError."""
        if frame.kind == "reduced":
            self._reduced[frame.group].take(frame.part, payload)
            return
        reduced = self._sums[frame.group, frame.part].add(frame.source, payload)
        if reduced is None:
            return
        del self._sums[frame.group, frame.part]
        group = self._groups[frame.group]
        shape = self._shape(frame.group, frame.part)
        for receiver in group.receivers(self._setup.plan):
            answer = self._setup.frame(
                "reduced", self._step, frame.target, receiver, shape,
                group=frame.group, part=frame.part,
            )  # fmt: skip
            self._post(answer, reduced)

    def is_complete(self, stage: int) -> bool:
        """Whether all reduced shards of all groups of a stage are here."""
        indices = self._setup.stage_groups[stage].indices
        return all(self._reduced[index].is_complete for index in indices)

    def digest(self, stage: int) -> str:
        """The SHA-256 over the stage's reduced gradient: its groups in order, in hex."""
        indices = self._setup.stage_groups[stage].indices
        return digest(self._setup.reduced[index].flat for index in indices)

    def sums_of_squares(self, stage: int) -> tuple[tuple[int, float], ...]:
        """(group, sum of squares) of each of the stage's groups, before any clipping."""
        indices = self._setup.stage_groups[stage].indices
        for index in indices:
            if index not in self._squares:
                self._squares[index] = sum_of_squares(self._setup.reduced[index].flat)
        return tuple((index, self._squares[index]) for index in indices)

    def apply(self, scale: float) -> None:
        """Scale the summed gradients and update every hosted stage."""
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

    def _shape(self, index: int, part: int) -> tuple[int]:
        start, stop = self._groups[index].shard(part)
        return (stop - start,)
