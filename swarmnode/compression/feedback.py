"""Error feedback: what a codec lost of one tensor is added to the next one.

Two phases, because an exchange may fail after the bytes have left: `prepare` changes nothing that
lasts, so the tensor that was not acknowledged is not forgotten (`rollback`).
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pending:
    """One exchange between `prepare` and its end."""

    tensor: Tensor
    """What to encode: the input and what was lost before. float32."""
    step: int
    drops: bool
    """Whether what was lost before is of another time or shape, and left out."""


class ErrorFeedback:
    """The residual of one tensor at one sender.

    A worker has one for each tensor that it sends; who sums and sends the sum has one for the
    sum. Both use it alike:

        pending = feedback.prepare(gradient, step)
        payload = codec.encode(pending.tensor)
        ... send; when all have it:
        feedback.commit(pending, codec.decode(payload, shape))     # else feedback.rollback(pending)

    With `decay` 1, all that was ever sent equals all inputs minus the residual (to rounding). A
    smaller one shrinks the residual by `decay` for every step that passed since the last commit,
    so also over an absence; after `max_absence` steps without one it is dropped: an old residual
    is an old gradient. It is dropped as well where an earlier step, or the same one, is done
    again: it is what that step left.
    """

    def __init__(self, *, decay: float = 1.0, max_absence: int | None = None) -> None:
        assert 0 <= decay <= 1
        self._decay = decay
        self._max_absence = max_absence
        self._residual: Tensor | None = None
        self._step = 0
        self._pending: Pending | None = None
        self.num_dropped = 0
        """Residuals that were dropped: of another time or shape, or not finite."""

    @property
    def residual(self) -> Tensor | None:
        """What is owed; None where nothing is. Not to be written to."""
        return self._residual

    @property
    def step(self) -> int:
        """The step that left the residual, where there is one."""
        return self._step

    def prepare(self, tensor: Tensor, step: int) -> Pending:
        """What to encode in `step` instead of `tensor`. Ends with `commit` or `rollback`."""
        assert self._pending is None, "one exchange at a time"
        corrected = tensor.detach().float().clone()
        residual, passed = self._residual, step - self._step
        is_stale = passed < 1 or (self._max_absence is not None and passed > self._max_absence)
        drops = residual is not None and (is_stale or residual.shape != corrected.shape)
        if residual is not None and not drops:
            corrected.add_(residual * self._decay**passed)
        self._pending = Pending(corrected, step, drops)
        return self._pending

    def commit(self, pending: Pending, sent: Tensor) -> None:
        """Everybody has `sent`, the decoded bytes: what it lacks of `pending.tensor` is owed."""
        residual = pending.tensor.sub(sent)
        is_finite = bool(residual.isfinite().all())
        self._end(pending)
        self._residual = residual if is_finite else None
        self._step = pending.step
        self.num_dropped += pending.drops + (not is_finite)

    def rollback(self, pending: Pending) -> None:
        """Nobody has it: the residual is, bit for bit, what it was before `prepare`."""
        self._end(pending)

    def _end(self, pending: Pending) -> None:
        assert pending is self._pending, "not the exchange that was prepared"
        self._pending = None
