"""Which slot owns which microbatch: pure functions of the manifest, the same on every node."""


def microbatches_of(slot: int, *, num_slots: int, num_microbatches: int) -> tuple[int, ...]:
    """The microbatches of pipeline `slot`, in order: those with `mb % num_slots == slot`."""
    return tuple(range(slot, num_microbatches, num_slots))


def num_evaluation_microbatches(*, wanted: int, available: int, num_slots: int) -> int:
    """How many held-out microbatches one evaluation takes.

    As many as wanted and available, rounded down to a multiple of `num_slots` so that every
    pipeline has the same share; where even `num_slots` are not available, all that there are.
    """
    count = min(wanted, available)
    return count - count % num_slots if count >= num_slots else count
