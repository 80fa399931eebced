"""1F1B for one slot: given what has arrived, which microbatch is next, and in which direction.

Source: PipeDream-Flush (Narayanan et al., arXiv:2006.09503). Forwards and backwards both run in
microbatch order, so that a slot's gradient sum never depends on the network's timing.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

Direction = Literal["forward", "backward"]


class Work(NamedTuple):
    """One microbatch through one slot, one way."""

    direction: Direction
    microbatch: int


class SlotSchedule:
    """Which work of one slot is next: a backward if there is one, else a forward.

    Bound: at most `num_stages - stage` microbatches, and `ahead` more except at the last stage,
    are forward but not yet backward. With `forward_only` there are no backwards and no bound.
    """

    def __init__(
        self,
        *,
        stage: int,
        num_stages: int,
        microbatches: Sequence[int],
        forward_only: bool = False,
        flush_every: int | None = None,
        ahead: int = 0,
    ) -> None:
        """`flush_every`: so many microbatches are all backward before the next one is forward."""
        self._microbatches = tuple(microbatches)
        self._is_last = stage == num_stages - 1
        self._forward_only = forward_only
        self._depth = num_stages - stage + (0 if self._is_last else ahead)
        self._activations = set(self._microbatches) if stage == 0 else set[int]()
        self._gradients = set[int]()
        self._num_forward = 0
        self._num_backward = 0
        self._flush_every = flush_every or max(1, len(self._microbatches))

    def wants(self, direction: Direction, microbatch: int) -> bool:
        """Whether the input of this work belongs to the slot and has not arrived before."""
        inputs = self._activations if direction == "forward" else self._gradients
        return microbatch in self._microbatches and microbatch not in inputs

    def arrived(self, direction: Direction, microbatch: int) -> None:
        """Note that the input of this work is here: the activation, or the output's gradient."""
        assert self.wants(direction, microbatch), (direction, microbatch)
        (self._activations if direction == "forward" else self._gradients).add(microbatch)

    def next(self) -> Work | None:
        """The work to do now, or None while its input is missing or all is done."""
        if self._num_backward < self._num_forward and not self._forward_only:
            microbatch = self._microbatches[self._num_backward]
            if microbatch in self._gradients:
                return Work("backward", microbatch)
        in_flight = 0 if self._forward_only else self._num_forward - self._num_backward
        group = self._num_forward // self._flush_every
        if not self._forward_only and group > self._num_backward // self._flush_every:
            return None
        if self._num_forward < len(self._microbatches) and in_flight < self._depth:
            microbatch = self._microbatches[self._num_forward]
            if microbatch in self._activations:
                return Work("forward", microbatch)
        return None

    def done(self, work: Work) -> None:
        """Note that `work`, the one that `next` gave, is done."""
        assert work == self.next(), work
        if work.direction == "backward":
            self._num_backward += 1
            return
        self._num_forward += 1
        if self._is_last and not self._forward_only:
            self._gradients.add(work.microbatch)  # the loss is its own gradient

    def forward_after(self, work: Work) -> int | None:
        """The microbatch that goes forward next once `work` is done, whether it is here or not."""
        at = self._num_forward + (work.direction == "forward")
        return self._microbatches[at] if at < len(self._microbatches) else None

    @property
    def is_flushed(self) -> bool:
        """Whether a whole group has just been backward."""
        return self._num_backward % self._flush_every == 0

    @property
    def is_finished(self) -> bool:
        """Whether the slot has counted all its microbatches."""
        count = self._num_forward if self._forward_only else self._num_backward
        return count == len(self._microbatches)
