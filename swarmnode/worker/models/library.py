"""The border to `transformers`: reads configs, builds empty models, silences the library.

Nothing here reaches the network, runs remote code or touches a pickle.
"""

import copy
import logging
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from swarmnode.errors import DataError

# The library logs advice for interactive users through its own logger; errors still come through.
logging.getLogger("transformers").setLevel(logging.ERROR)

ModelConfig: TypeAlias = "Mapping[str, Any] | transformers.PreTrainedConfig"
"""A Hugging Face causal-LM config: the content of `config.json`, or the library's object."""
Attention = Literal["sdpa", "eager"]
"""sdpa: torch's fused attention, where the family supports it; eager: plain matrix products."""

VERIFIED_FAMILIES = frozenset({"gpt2", "gpt_neox", "llama", "mistral", "mixtral", "opt", "qwen3"})
"""Families whose cut models are tested against the whole model: logits, gradients, cache."""

_LARGEST = {
    "num_hidden_layers": 1024,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "ffn_dim": 1 << 20,
    "n_inner": 1 << 20,
    "word_embed_proj_dim": 1 << 17,
    "vocab_size": 1 << 22,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 1 << 14,
    "num_local_experts": 4096,
    "num_experts": 4096,
    "max_position_embeddings": 1 << 24,
}
"""The largest value of each size that a config from a stranger may ask for."""

_OURS = ("attn_implementation", "experts_implementation", "dtype", "torch_dtype")
"""Config keys that this program decides; what a stranger wrote there is ignored."""


def read_config(config: ModelConfig) -> transformers.PreTrainedConfig:
    """Return a checked private copy of a causal-LM config, with every dropout switched off.

    Raises: DataError if the architecture is unknown, needs code or quantised weights that are
    not here, or a size is missing or over its limit.
    """
    content = config.to_dict() if isinstance(config, transformers.PreTrainedConfig) else config
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise DataError(f"model_type {model_type!r} is not a causal language model known here")
    for key in ("auto_map", "quantization_config"):
        if content.get(key):
            raise DataError(f"a model with {key} cannot be used: it needs code that is not here")
    kept = {k: v for k, v in copy.deepcopy(dict(content)).items() if not _is_ours(k)}
    try:
        read = CONFIG_MAPPING[model_type].from_dict(kept)
        _check_sizes(read, model_type)
        _switch_dropout_off(read)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"the {model_type} config is not valid: {one_line(error)}") from error
    return read


def check_vocabulary(config: ModelConfig, num_tokens: int) -> None:
    """Check that a tokenizer of `num_tokens` ids fits. Raises: DataError if the model has fewer."""
    vocab_size = read_config(config).vocab_size
    if num_tokens > vocab_size:
        raise DataError(
            f"the tokenizer has {num_tokens} ids but the model's vocabulary only {vocab_size}"
        )


def build_empty(
    config: transformers.PreTrainedConfig, dtype: torch.dtype, attention: Attention
) -> transformers.PreTrainedModel:
    """Build the whole model on the meta device: names, shapes and code, but no memory.

    Raises: DataError if the library cannot build a model of this config.
    """
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                copy.deepcopy(config),
                dtype=dtype,
                attn_implementation="eager" if attention == "eager" else None,
                trust_remote_code=False,
            )
    except Exception as error:
        raise DataError(
            f"no {config.model_type} model of this config can be built: {one_line(error)}"
        ) from error
    assert isinstance(model, transformers.PreTrainedModel)
    return model.eval()


def tied_names(model: transformers.PreTrainedModel) -> dict[str, str]:
    """Return copy -> canonical for the parameters that the whole model shares; may be empty."""
    names: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    return dict(names)


def _is_ours(key: str) -> bool:
    return key in _OURS or key.startswith(("_attn_", "_experts_"))


def _check_sizes(config: transformers.PreTrainedConfig, model_type: str) -> None:
    for name, largest in _LARGEST.items():
        value = getattr(config, name, None)
        if value is None and name not in ("num_hidden_layers", "hidden_size", "vocab_size"):
            continue
        if type(value) is not int or not 1 <= value <= largest:
            raise DataError(f"{name} of this {model_type} config is {value!r}, not 1..{largest}")


def _switch_dropout_off(config: transformers.PreTrainedConfig) -> None:
    """Zero every source of chance: a step must be a function of its inputs."""
    for name, value in list(vars(config).items()):
        is_chance = name.endswith(("dropout", "pdrop", "layerdrop", "jitter_noise"))
        if is_chance and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, name, 0.0)


def one_line(error: Exception) -> str:
    """Return what an error of the library says, as at most 200 characters without a break."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
