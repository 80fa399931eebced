"""Checkpoints on their way: asked of holders, published by them, stored by the coordinator."""

from collections.abc import Iterator

from swarmnode.coordinator.events import CheckpointRecord
from swarmnode.domain import BlobRef


class Publications:
    """States that were asked for, by step; complete when every stage's chunks are stored."""

    def __init__(self) -> None:
        self._indexes: dict[int, dict[int, BlobRef | None]] = {}
        self._stored: dict[int, set[int]] = {}

    def __bool__(self) -> bool:
        return bool(self._indexes)

    def __contains__(self, step: int) -> bool:
        return step in self._indexes

    def ask(self, step: int, num_stages: int) -> Iterator[int]:
        """Begin to collect the state after `step` committed steps; the stages to ask for."""
        self._indexes[step] = dict.fromkeys(range(num_stages))
        self._stored[step] = set()
        return iter(range(num_stages))

    def published(self, step: int, stage: int, index: BlobRef) -> bool:
        """A holder answered; False if nobody asked."""
        if stage not in self._indexes.get(step, {}):
            return False
        self._indexes[step][stage] = index
        return True

    def stored(self, step: int, stage: int) -> CheckpointRecord | None:
        """The chunks of one stage are here; the checkpoint once all are."""
        wanted = self._indexes.get(step)
        if wanted is None:
            return None
        self._stored[step].add(stage)
        indexes = tuple(index for _, index in sorted(wanted.items()) if index is not None)
        if len(self._stored[step]) < len(wanted):
            return None
        self.give_up(step)
        return CheckpointRecord(step, indexes)

    def give_up(self, step: int) -> None:
        self._indexes.pop(step, None)
        self._stored.pop(step, None)

    def give_up_unanswered(self) -> None:
        """A new generation begins: holders that have not answered yet will not."""
        for step in [s for s, indexes in self._indexes.items() if None in indexes.values()]:
            self.give_up(step)
