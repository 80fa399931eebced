"""Random initial weights that do not depend on how, or on what device, the model is cut."""

import copy
import hashlib

import torch
import transformers
from torch import Tensor, nn

from swarmnode.errors import DataError
from swarmnode.worker.models.parts import Parts, find_parts, iterate_parts
from swarmnode.worker.models.stage import StageModule


def initialize(module: StageModule | transformers.PreTrainedModel, seed: int) -> None:
    """Fill a stage, or a whole model, with the family's own random initial weights.

    Every module draws from a generator that is seeded by SHA-256 of the seed and of the module's
    name in the whole model, in float32 on the CPU; the values are then rounded to the module's
    dtype. So equal seeds give equal weights for any cut and any device. A tied head of its own
    gets the embedding's values.
    Raises: DataError if the family leaves a parameter without an initial value.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        if not isinstance(module, StageModule):
            _initialize_parts(module, find_parts(module), seed)
            return
        module.renumber_layers(module.layers[0])
        try:
            _initialize_parts(module.model, module.parts, seed)
        finally:
            module.renumber_layers(-module.layers[0])
        if module.is_last:
            for head, embedding in module.tied.items():
                _copy_embedding(module, head, embedding, seed)


def _initialize_parts(model: transformers.PreTrainedModel, parts: Parts, seed: int) -> None:
    for name, part in iterate_parts(model, parts):
        _initialize_part(model, part, name, seed)


def _initialize_part(
    model: transformers.PreTrainedModel, part: nn.Module, part_name: str, seed: int
) -> None:
    """Initialise one part, children first, in float32 on the CPU, then copy it into place."""
    places: dict[nn.Parameter, Tensor] = {p: p.data for p in part.parameters()}
    try:
        for parameter in places:
            vars(parameter).pop("_is_hf_initialized", None)
            parameter.data = torch.full(parameter.shape, torch.nan)
        _visit(model, part, part_name, seed)
        for name, parameter in part.named_parameters():
            if bool(parameter.isnan().any()):
                raise DataError(f"{model.config.model_type} does not initialise {name}")
        for parameter, place in places.items():
            place.copy_(parameter.data)
    finally:
        for parameter, place in places.items():
            parameter.data = place


def _visit(model: transformers.PreTrainedModel, module: nn.Module, name: str, seed: int) -> None:
    for child_name, child in module.named_children():
        _visit(model, child, f"{name}.{child_name}", seed)
    if any(True for _ in module.parameters()):
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        model._init_weights(module)


def _copy_embedding(stage: StageModule, head: str, embedding: str, seed: int) -> None:
    """Give the head's own copy the values that the first stage gives to the embedding."""
    template = copy.deepcopy(stage.embedding.module).to_empty(device="cpu").float()
    _initialize_part(stage.model, template, embedding.rpartition(".")[0], seed)
    stage.parameters_by_name()[head].copy_(template.get_parameter("weight"))
