"""AdamW on one vector, as each slot runs it between exchanges."""

import math

import torch
from torch import Tensor


class InnerAdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), gradients clipped by norm.

    Its second half can be had alone, with a momentum that others have averaged and a variance
    that does not move any more: QAdam (Bagua), 1-bit Adam (arXiv 2102.02888). Its state is where
    the vector is.
    """

    def __init__(
        self,
        theta_N: Tensor,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        num_decayed: int | None = None,
        clip: float = 1.0,
    ) -> None:
        self._betas, self._weight_decay, self._clip = betas, weight_decay, clip
        self._num_decayed = len(theta_N) if num_decayed is None else num_decayed
        self.momentum_N, self.variance_N = torch.zeros_like(theta_N), torch.zeros_like(theta_N)
        self.num_steps = 0
        self._frozen_N: Tensor | None = None

    def step(self, theta_N: Tensor, gradient_N: Tensor, rate: float) -> None:
        """One step, in place."""
        gradient_N = self._clipped(gradient_N)
        first, second = self._betas
        self.num_steps += 1
        self.momentum_N.mul_(first).add_(gradient_N, alpha=1 - first)
        self.variance_N.mul_(second).addcmul_(gradient_N, gradient_N, value=1 - second)
        deviation_N = self.variance_N.div(1 - second**self.num_steps).sqrt_().add_(1e-8)
        self._move(theta_N, deviation_N, rate)

    def momentum_with(self, gradient_N: Tensor) -> Tensor:
        """What the momentum would be; nothing changes."""
        first = self._betas[0]
        return torch.add(self.momentum_N * first, self._clipped(gradient_N), alpha=1 - first)

    def step_with(self, theta_N: Tensor, momentum_N: Tensor, rate: float) -> None:
        """One step with this momentum and the variance as it was when this was first called.

        Values whose gradient was still 0 would divide by nothing: the variance is at least a
        hundredth of its mean (ours).
        """
        if self._frozen_N is None:
            variance_N = self.variance_N / (1 - self._betas[1] ** max(1, self.num_steps))
            floor = max(float(variance_N.mean()) / 100, 1e-16)
            self._frozen_N = variance_N.clamp_min_(floor).sqrt_()
        self.num_steps += 1
        self.momentum_N = momentum_N.clone()
        self._move(theta_N, self._frozen_N, rate)

    def _move(self, theta_N: Tensor, deviation_N: Tensor, rate: float) -> None:
        theta_N[: self._num_decayed].mul_(1 - rate * self._weight_decay)
        scale = rate / (1 - self._betas[0] ** self.num_steps)
        theta_N.addcdiv_(self.momentum_N, deviation_N, value=-scale)

    def _clipped(self, gradient_N: Tensor) -> Tensor:
        norm = float(torch.linalg.vector_norm(gradient_N))
        if not math.isfinite(norm) or norm <= self._clip:
            return gradient_N
        return gradient_N * (self._clip / norm)
