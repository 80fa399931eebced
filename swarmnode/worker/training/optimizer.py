"""AdamW over one stage's parameters, deterministic: the same gradients give the same bits."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from swarmnode.errors import DataError
from swarmnode.manifest import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps for each parameter; in files, tensor `NAME::exp_avg` belongs to `NAME`."""


class Optimizer(Protocol):
    """What a stage's committed updates are applied with, and what of it belongs to the state."""

    moment_names: tuple[str, ...]

    def apply(self, gradients: Mapping[str, Tensor], *, step: int, num_steps: int) -> None: ...
    def moments(self) -> dict[str, Tensor]: ...
    def set_state(self, step: int, moments: Mapping[str, Tensor]) -> None: ...


class StageOptimizer:
    """The optimizer of one stage, and the moments that belong to its state.

    Weight decay is decoupled and only for parameters with two or more dimensions.
    Source: Loshchilov and Hutter, arXiv:1711.05101.
    """

    def __init__(self, parameters: Mapping[str, Parameter], config: OptimizerConfig) -> None:
        self._parameters = dict(sorted(parameters.items()))
        self._config = config
        matrices = [p for p in self._parameters.values() if p.ndim >= 2]
        others = [p for p in self._parameters.values() if p.ndim < 2]
        self.moment_names: tuple[str, ...] = MOMENTS
        self._adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            foreach=False,
            fused=False,
        )
        self.set_state(0, {})

    def apply(self, gradients: Mapping[str, Tensor], *, step: int, num_steps: int) -> None:
        """Update the parameters for step `step` (from 0) of `num_steps`."""
        for group in self._adamw.param_groups:
            group["lr"] = self._config.learning_rate_at(step, num_steps)
        for name, parameter in self._parameters.items():
            parameter.grad = gradients[name]
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)

    def moments(self) -> dict[str, Tensor]:
        """Every moment by its name in a file; the optimizer's own tensors, not copies."""
        return {
            f"{name}::{moment}": self._adamw.state[parameter][moment]
            for name, parameter in self._parameters.items()
            for moment in MOMENTS
        }

    def set_state(self, step: int, moments: Mapping[str, Tensor]) -> None:
        """Become the optimizer after `step` steps; moments that are absent are zero.

        Raises: DataError if a moment is not float32 or not shaped like its parameter.
        """
        for name, parameter in self._parameters.items():
            state: dict[str, Tensor] = {"step": torch.tensor(float(step))}
            for moment in MOMENTS:
                value = moments.get(f"{name}::{moment}")
                if value is None:
                    value = torch.zeros_like(parameter)
                if value.shape != parameter.shape or value.dtype != torch.float32:
                    raise DataError(f"{name}::{moment} is {value.dtype} {tuple(value.shape)}")
                state[moment] = value.to(parameter.device)
            self._adamw.state[parameter] = state
