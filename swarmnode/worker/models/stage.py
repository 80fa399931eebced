"""A stage: some layers of a causal language model, as one module that knows only its own part.

Shapes: B sequences, S new tokens each, T = S + tokens already cached, D hidden, V vocabulary.
"""

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from swarmnode.errors import DataError
from swarmnode.worker.models.library import (
    Attention,
    ModelConfig,
    build_empty,
    one_line,
    read_config,
    tied_names,
)
from swarmnode.worker.models.parts import (
    LayerRange,
    NoPositions,
    Parts,
    decoder_of,
    find_parts,
)


class StageModule(nn.Module):
    """Decoder layers [start, stop) of a model, run by the library's own forward pass.

    The first stage takes tokens (B, S) int64, every other one hidden states (B, S, D); the last
    returns logits (B, S, V), every other one hidden states (B, S, D). Build with `build_stage`.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        parts: Parts,
        layers: tuple[int, int],
        device: torch.device,
    ) -> None:
        super().__init__()
        start, stop = layers
        self.config = model.config
        self.parts = parts
        self.layers = layers
        self.is_first = start == 0
        self.is_last = stop == model.config.num_hidden_layers
        self.hidden_size: int = model.config.hidden_size
        self.vocab_size: int = model.config.vocab_size
        self.max_positions: int = model.config.max_position_embeddings
        self.device = device
        tied = tied_names(model)
        is_cut = not (self.is_first and self.is_last)
        self.tied: dict[str, str] = tied if is_cut and (self.is_first or self.is_last) else {}
        """Head copy -> embedding, on the first and on the last stage of a cut model that ties
        them: the sum of both gradients is the gradient, and both must stay equal."""
        self.embedding = _Unregistered(model.get_input_embeddings())
        self._cut(model)
        self.model = model

    def forward(
        self,
        inputs: Tensor,
        *,
        cache: transformers.Cache | None = None,
        position: int | None = None,
        positions_BS: Tensor | None = None,
        mask_BT: Tensor | None = None,
        num_logits: int = 0,
    ) -> Tensor:
        """Run the stage on tokens (first stage) or on the previous stage's hidden states.

        With a `cache` of `new_cache()` the inputs continue what is cached; `position`, if given,
        must be the number of cached tokens. `positions_BS` and `mask_BT` (1 = a real token)
        serve left-padded batches. `num_logits` > 0 keeps only the last so many positions.
        Raises: DataError for inputs of the wrong shape or dtype, tokens outside the vocabulary,
        or more than `max_positions` tokens.
        """
        num_cached = 0 if cache is None else int(cache.get_seq_length())
        assert position is None or position == num_cached, (position, num_cached)
        self._check(inputs, num_cached)
        given: dict[str, Any] = {
            "input_ids" if self.is_first else "inputs_embeds": inputs.to(self.device),
            "past_key_values": cache,
            "use_cache": cache is not None,
            "position_ids": None if positions_BS is None else positions_BS.to(self.device),
            "attention_mask": None if mask_BT is None else mask_BT.to(self.device),
        }
        if self.is_last:
            logits: Tensor = self.model(**given, logits_to_keep=num_logits).logits
            return logits
        hidden_BSD: Tensor = decoder_of(self.model, self.parts)(**given).last_hidden_state
        return hidden_BSD

    def new_cache(self) -> transformers.DynamicCache:
        """Return an empty KV cache for this stage's layers; sliding windows are bounded."""
        return transformers.DynamicCache(config=decoder_of(self.model, self.parts).config)

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """Return the stage's parameters under their names in the whole model, in a fixed order."""
        return dict(self.model.named_parameters())

    def tensors_by_name(self) -> dict[str, Tensor]:
        """Return the parameters, then the buffers that are stored with the weights, by name."""
        found: dict[str, Tensor] = dict(self.parameters_by_name())
        stored = self.model.state_dict(keep_vars=True)
        found.update({n: b for n, b in self.model.named_buffers() if n in stored})
        return found

    def renumber_layers(self, offset: int) -> None:
        """Add `offset` to the number that each layer keeps of itself.

        In a forward pass it is the layer's place in the stage's KV cache; while values are
        derived from it (a scale by depth) it must be the number in the whole model.
        """
        for layer in decoder_of(self.model, self.parts).get_submodule(self.parts.layers).children():
            for module in layer.modules():
                number = vars(module).get("layer_idx")
                if type(number) is int:
                    vars(module)["layer_idx"] = number + offset

    def _cut(self, model: transformers.PreTrainedModel) -> None:
        """Throw away whatever belongs to another stage, before anything is allocated."""
        start, stop = self.layers
        decoder = decoder_of(model, self.parts)
        kept = list(decoder.get_submodule(self.parts.layers).children())[start:stop]
        setattr(decoder, self.parts.layers, LayerRange(kept, start))
        decoder.config = _config_of_range(model.config, start, stop)
        if not self.is_first:
            self._remove(decoder, self.parts.front)
            if self.parts.positions is not None:
                setattr(decoder, self.parts.positions, NoPositions())
        if not self.is_last:
            self._remove(decoder, self.parts.back)
            self._remove(model, self.parts.head)

    def _remove(self, module: nn.Module, names: tuple[str, ...]) -> None:
        for name in names:
            if getattr(module, name, None) is not None:
                setattr(module, name, None if name in self.parts.optional else nn.Identity())

    def _check(self, inputs: Tensor, num_cached: int) -> None:
        if self.is_first:
            if inputs.dtype != torch.int64 or inputs.ndim != 2:
                raise DataError(f"tokens must be (B, S) int64, not {tuple(inputs.shape)}")
            if inputs.device.type == "cpu" and inputs.numel() > 0:
                low, high = inputs.aminmax()
                if int(low) < 0 or int(high) >= self.vocab_size:
                    raise DataError(f"a token is outside the vocabulary of {self.vocab_size}")
        elif inputs.ndim != 3 or inputs.shape[-1] != self.hidden_size:
            raise DataError(f"hidden states must be (B, S, {self.hidden_size})")
        if inputs.shape[0] < 1 or inputs.shape[1] < 1:
            raise DataError("a stage needs at least one token")
        if num_cached + inputs.shape[1] > self.max_positions:
            raise DataError(f"more than the model's {self.max_positions} positions")


def build_stage(
    config: ModelConfig,
    *,
    layers: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attention: Attention = "sdpa",
) -> StageModule:
    """Build layers [start, stop) of a model on `device`; only the stage's tensors are allocated.

    Parameters hold no values yet: use `initialize` or `load_tensors`. Buffers that are derived
    from the config (rotary frequencies) are right at once. Dropout is off.
    Raises: DataError if the model is unknown, cannot be cut, or has no such layers. A family that
    changes hidden states outside its layers where a stage has neither embeddings nor norm is found
    out by a trial run without layers.
    """
    stage = _build_empty_stage(config, layers, dtype, torch.device(device), attention)
    with torch.no_grad():
        _allocate(stage.model, stage.device)
        _derive_buffers(stage.model)
        stage.renumber_layers(-layers[0])
        _check_borders(stage)
    return stage


def stage_shapes(
    config: ModelConfig, layers: tuple[int, int], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return the stage's tensors by name, on the meta device: shapes and dtypes, no memory.

    A tied head of a last stage that is not the first is among them, as the copy that it is.
    """
    stage = _build_empty_stage(config, layers, dtype, torch.device("meta"), "sdpa")
    return {name: tensor.detach() for name, tensor in stage.tensors_by_name().items()}


class _Unregistered:
    """Holds a module without making it a child, so that it is never allocated or named."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


def _build_empty_stage(
    config: ModelConfig,
    layers: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    attention: Attention,
) -> StageModule:
    checked = read_config(config)
    start, stop = layers
    if not 0 <= start < stop <= checked.num_hidden_layers:
        raise DataError(
            f"layers [{start}, {stop}) are not in a model of {checked.num_hidden_layers}"
        )
    model = build_empty(checked, dtype, attention)
    return StageModule(model, find_parts(model), layers, device).eval()


def _config_of_range(
    config: transformers.PreTrainedConfig, start: int, stop: int
) -> transformers.PreTrainedConfig:
    """Return the decoder's view of the config: it has only the stage's layers."""
    sliced = copy.deepcopy(config)
    layer_types = getattr(config, "layer_types", None)
    sliced.num_hidden_layers = stop - start
    if layer_types is not None:
        sliced.layer_types = list(layer_types[start:stop])
    return sliced


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Give every meta tensor memory on `device`; shared parameters stay shared."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty_like(parameter, device=device)
                    made[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)


def _derive_buffers(model: transformers.PreTrainedModel) -> None:
    """Compute the buffers that are not stored with the weights, as the library itself does."""
    for module in model.modules():
        if module._non_persistent_buffers_set:
            model._init_weights(module)


def _check_borders(stage: StageModule) -> None:
    """Run the stage with its layers passed over: hidden states must come through unchanged.

    So a family whose forward pass scales embeddings, say, is refused and not silently wrong.
    Raises: DataError.
    """
    decoder = decoder_of(stage.model, stage.parts)
    layers = list(decoder.get_submodule(stage.parts.layers).children())
    entered: list[Tensor] = []

    def pass_over(hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        entered.append(hidden_states)
        return hidden_states

    shape = (1, 2, stage.hidden_size)
    dtype = next(stage.model.parameters()).dtype
    hidden = torch.linspace(-2.0, 2.0, 2 * stage.hidden_size).reshape(shape).to(dtype)
    inputs = torch.zeros((1, 2), dtype=torch.int64) if stage.is_first else hidden
    try:
        for layer in layers:
            vars(layer)["forward"] = pass_over
        left = stage(inputs)
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError) as error:
        family = stage.config.model_type
        raise DataError(f"{family} models cannot be cut: {one_line(error)}") from error
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
    if len(entered) != len(layers):
        raise DataError(f"{stage.config.model_type} models cannot be cut: a layer is not run once")
    came_in = stage.is_first or torch.equal(entered[0], hidden.to(stage.device))
    went_out = stage.is_last or torch.equal(left.nan_to_num(), entered[-1].nan_to_num())
    if not came_in or not went_out:
        raise DataError(
            f"{stage.config.model_type} models cannot be cut: they change hidden states "
            "outside their layers"
        )
