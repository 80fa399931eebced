"""Which module of a whole model is what: embeddings in front, layers, norm and head at the back."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from swarmnode.errors import DataError


@dataclass(frozen=True)
class Parts:
    """The names of a causal LM's parts. `front`, `layers`, `back` are children of the decoder."""

    decoder: str
    """Path from the model to the module that holds the layers."""
    front: tuple[str, ...]
    """What only the first stage has, in order of use."""
    layers: str
    back: tuple[str, ...]
    """What only the last stage has, before the head."""
    positions: str | None = None
    """The child of `front` that the decoder calls even when it is given hidden states."""
    optional: tuple[str, ...] = ()
    """Those of `front` and `back` that the decoder skips where they are None."""
    head: tuple[str, ...] = ("lm_head",)
    """Children of the model itself that only the last stage has."""


SEAMS: Mapping[str, Parts] = {
    "gpt2": Parts("transformer", ("wte", "wpe", "drop"), "h", ("ln_f",), positions="wpe"),
    "opt": Parts(
        "model.decoder",
        ("embed_tokens", "embed_positions", "project_in"),
        "layers",
        ("final_layer_norm", "project_out"),
        positions="embed_positions",
        optional=("project_in", "final_layer_norm", "project_out"),
    ),
}
"""Families whose configs carry no `base_model_pp_plan`, which names the parts of all others."""


class NoPositions(nn.Module):
    """Stands for learned positional embeddings in a later stage: they were added in the first."""

    def forward(self, *_: object, **__: object) -> Tensor:
        return torch.zeros(())


class LayerRange(nn.ModuleList):
    """Layers [start, start + n) of a model, registered under their numbers in the whole model.

    So `named_parameters()` gives the whole model's names; iteration and slices count from zero,
    as the library's decoder loops expect.
    """

    def __init__(self, layers: list[nn.Module], start: int) -> None:
        super().__init__()
        for number, layer in enumerate(layers, start):
            self.add_module(str(number), layer)

    def __getitem__(self, index: Any) -> Any:
        return list(self._modules.values())[index]


def find_parts(model: transformers.PreTrainedModel) -> Parts:
    """Name the parts of a whole model.

    Raises: DataError if the family does not say what its parts are, or has parameters elsewhere.
    """
    family = model.config.model_type
    if getattr(model.config, "num_kv_shared_layers", 0):
        raise DataError(f"{family} models cannot be cut: their layers share a KV cache")
    parts = SEAMS.get(family) or _planned_parts(model)
    decoder = decoder_of(model, parts)
    layers = getattr(decoder, parts.layers, None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != model.config.num_hidden_layers:
        raise DataError(f"{family} models cannot be cut: their layers are not one plain list")
    known = {id(p) for _, part in iterate_parts(model, parts) for p in part.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in known:
            raise DataError(f"{family} models cannot be cut: {name} belongs to no known part")
    return parts


def decoder_of(model: nn.Module, parts: Parts) -> nn.Module:
    """Return the module that holds the layers."""
    return model.get_submodule(parts.decoder)


def iterate_parts(model: nn.Module, parts: Parts) -> Iterator[tuple[str, nn.Module]]:
    """Yield (whole-model name, module): head, back, each layer, then front; absent ones left out.

    The front comes last, so that shared embeddings end up with the embedding's own values.
    """
    decoder = decoder_of(model, parts)
    for name in parts.head:
        yield name, model.get_submodule(name)
    for name in parts.back:
        if getattr(decoder, name, None) is not None:
            yield f"{parts.decoder}.{name}", getattr(decoder, name)
    for number, layer in decoder.get_submodule(parts.layers).named_children():
        yield f"{parts.decoder}.{parts.layers}.{number}", layer
    for name in parts.front:
        if getattr(decoder, name, None) is not None:
            yield f"{parts.decoder}.{name}", getattr(decoder, name)


def _planned_parts(model: transformers.PreTrainedModel) -> Parts:
    plan = cast(Mapping[str, Any] | None, getattr(model.config, "base_model_pp_plan", None))
    prefix = model.base_model_prefix
    decoder = getattr(model, prefix, None)
    if not plan or "layers" not in plan or decoder is None:
        raise DataError(f"{model.config.model_type} models do not say how they can be cut")
    names = list(plan)
    cut = names.index("layers")
    head = tuple(name for name, child in model.named_children() if child is not decoder)
    return Parts(prefix, tuple(names[:cut]), "layers", tuple(names[cut + 1 :]), head=head)
