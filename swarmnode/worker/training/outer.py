"""The optimizer of a stage whose slots train on their own: what moves their common anchor.

A committed update is the sum, over the slots, of how far each went from the anchor. The same sum
gives the same bits wherever it is applied.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from swarmnode.compression.sync.layout import Part
from swarmnode.compression.sync.outer import OuterMomentum
from swarmnode.errors import DataError
from swarmnode.sync_specs import Outer

OUTER_MOMENTS = ("outer_momentum",)
"""In files, tensor `NAME::outer_momentum` belongs to `NAME`."""


class OuterOptimizer:
    """SGD on the anchor with the mean difference as its gradient, with momentum where asked for.

    Sources: DiLoCo, arXiv:2311.08105 (Nesterov); SparseLoCo, arXiv:2508.15706 (SGD).
    """

    def __init__(self, parameters: Mapping[str, Parameter], outer: Outer, num_slots: int) -> None:
        self._parameters = dict(sorted(parameters.items()))
        self._num_slots = num_slots
        self._parts: dict[str, Part] = {}
        start = 0
        for name, parameter in self._parameters.items():
            stop = start + parameter.numel()
            self._parts[name] = Part(start, stop, (stop - start,), 0, 0, is_small=False)
            start = stop
        device = next(iter(self._parameters.values())).device
        self._momentum = OuterMomentum(outer, start, device)
        self.moment_names: tuple[str, ...] = OUTER_MOMENTS if outer.momentum else ()

    def apply(
        self,
        gradients: Mapping[str, Tensor],
        *,
        step: int,  # noqa: ARG002
        num_steps: int,  # noqa: ARG002 - every step is alike
    ) -> None:
        """Move the anchor by the summed differences; every step alike."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                part = self._parts[name]
                mean = gradients[name].reshape(-1) / self._num_slots
                moves, momentum = self._momentum.moves({part: mean})
                parameter.sub_(moves[part].view_as(parameter))
                self._momentum.keep(momentum)

    def moments(self) -> dict[str, Tensor]:
        """Every momentum by its name in a file; the optimizer's own tensors, not copies."""
        return {f"{name}::{m}": self._view(name) for name in self._parts for m in self.moment_names}

    def set_state(self, step: int, moments: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        """Become the optimizer after `step` steps; what is absent is zero.

        Raises: DataError if a momentum is not float32 or not shaped like its parameter.
        """
        for name, parameter in self._parameters.items():
            for moment in self.moment_names:
                value = moments.get(f"{name}::{moment}")
                if value is None:
                    self._view(name).zero_()
                    continue
                if value.shape != parameter.shape or value.dtype != torch.float32:
                    raise DataError(f"{name}::{moment} is {value.dtype} {tuple(value.shape)}")
                self._view(name).copy_(value)

    def _view(self, name: str) -> Tensor:
        part = self._parts[name]
        return self._momentum.momentum_N[part.start : part.stop].view_as(self._parameters[name])
