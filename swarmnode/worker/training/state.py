"""The state of one stage: weights and moments after so many committed steps, and its files.

In a file, the weight `NAME` is tensor `NAME`, its moments are `NAME::exp_avg` and
`NAME::exp_avg_sq`, or with local steps `NAME::outer_momentum`. Everything is float32.
"""

import time
from collections.abc import Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from swarmnode.errors import DataError
from swarmnode.manifest import Manifest
from swarmnode.tensorfiles import TensorSpan, read_bytes, read_header
from swarmnode.worker.models import StageModule, build_stage, initialize, load_tensors
from swarmnode.worker.training.fingerprint import digest
from swarmnode.worker.training.optimizer import Optimizer, StageOptimizer
from swarmnode.worker.training.outer import OuterOptimizer

_MOMENT_MARK = "::"


@dataclass
class StageState:
    """One stage as a node holds it. `step` is -1 while an update is under way or was cut off."""

    module: StageModule
    optimizer: Optimizer | None
    step: int
    copying: Future[None] | None = None
    """The copy of this state that is being made aside; no update before it is done."""
    stall_s: float = 0.0
    """Seconds that updates have waited for copies."""

    @property
    def layers(self) -> tuple[int, int]:
        return self.module.layers

    def apply(self, gradients: Mapping[str, Tensor], *, num_steps: int) -> None:
        """Apply the optimizer for the step at hand; the state is then one step further."""
        assert self.optimizer is not None
        if self.copying is not None:
            started_s = time.perf_counter()
            wait([self.copying])
            self.copying = None
            self.stall_s += time.perf_counter() - started_s
        step, self.step = self.step, -1
        self.optimizer.apply(gradients, step=step, num_steps=num_steps)
        self.step = step + 1

    def state_hash(self) -> str:
        """The SHA-256 over the weights in sorted order of their names, in hex."""
        parameters = self.module.parameters_by_name()
        return digest(parameters[name] for name in sorted(parameters))

    def tensors(self) -> dict[str, Tensor]:
        """Everything that belongs to the state by its name in a file, not copied."""
        tensors = dict(self.module.tensors_by_name())
        if self.optimizer is not None:
            tensors.update(self.optimizer.moments())
        return dict(sorted(tensors.items()))


def initial_state(manifest: Manifest, layers: tuple[int, int], device: str) -> StageState:
    """The stage with weights drawn from the manifest's seed, before the first step."""
    state = _empty_state(manifest, layers, device)
    initialize(state.module, manifest.run.seed)
    return state


def loaded_state(
    manifest: Manifest, layers: tuple[int, int], device: str, *, path: Path, step: int
) -> StageState:
    """The stage after `step` committed steps, from a safetensors file; absent moments are zero.

    Raises: DataError if the file lacks a weight or a tensor has another shape or dtype.
    """
    state = _empty_state(manifest, layers, device)
    spans = read_header(path)
    weights = {name: span for name, span in spans.items() if _MOMENT_MARK not in name}
    load_tensors(state.module, weights)
    state.step = step
    if state.optimizer is not None:
        state.optimizer.set_state(step, _moments(state, spans))
    return state


def local_state(manifest: Manifest, layers: tuple[int, int], device: str) -> StageState:
    """What a slot that trains on its own has for itself: no values yet, moments of zero."""
    module = build_stage(manifest.model.config, layers=layers, device=device)
    return StageState(module, StageOptimizer(module.parameters_by_name(), manifest.optimizer), 0)


def _empty_state(manifest: Manifest, layers: tuple[int, int], device: str) -> StageState:
    trains = manifest.kind == "train"
    is_half = not trains and manifest.run.compute == "bfloat16"
    dtype = torch.bfloat16 if is_half else torch.float32
    module = build_stage(manifest.model.config, layers=layers, dtype=dtype, device=device)
    return StageState(module, _optimizer(manifest, module) if trains else None, 0)


def _optimizer(manifest: Manifest, module: StageModule) -> Optimizer:
    sync, parameters = manifest.codecs.local, module.parameters_by_name()
    if sync is None:
        return StageOptimizer(parameters, manifest.optimizer)
    return OuterOptimizer(parameters, sync.outer, manifest.placement.slots)


def _moments(state: StageState, spans: Mapping[str, TensorSpan]) -> dict[str, Tensor]:
    """Read the moments of the stage's parameters; a tied head has those of its embedding."""
    found: dict[str, Tensor] = {}
    module, optimizer = state.module, state.optimizer
    assert optimizer is not None
    for name, parameter in module.parameters_by_name().items():
        for moment in optimizer.moment_names:
            stored = f"{name}{_MOMENT_MARK}{moment}"
            if stored not in spans and name in module.tied:
                stored = f"{module.tied[name]}{_MOMENT_MARK}{moment}"
            if stored in spans:
                value = _read_float32(stored, spans[stored], tuple(parameter.shape))
                found[f"{name}{_MOMENT_MARK}{moment}"] = value
    return found


def _read_float32(name: str, span: TensorSpan, shape: tuple[int, ...]) -> Tensor:
    if span.dtype != "F32" or span.shape != shape:
        raise DataError(f"{name} is {span.dtype} {span.shape} in the file, not F32 {shape}")
    return torch.frombuffer(read_bytes(span), dtype=torch.float32).reshape(shape)
