"""Configs of tiny models, at least one of every verified family, for the tests of the worker."""

from typing import Any

import pytest

TINY = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
"""Large initial weights, so that a wrong mask or position shows in the logits."""

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**TINY, "model_type": "llama", "intermediate_size": 48, "num_key_value_heads": 2},
    "llama-tied": {
        **TINY,
        "model_type": "llama",
        "intermediate_size": 48,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "attention_dropout": 0.1,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen3": {
        **TINY,
        "model_type": "qwen3",
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
    },
    "mistral": {
        **TINY,
        "model_type": "mistral",
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "sliding_window": 6,
    },
    "mixtral": {
        **TINY,
        "model_type": "mixtral",
        "intermediate_size": 24,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "sliding_window": None,
        "router_jitter_noise": 0.1,
    },
    "gpt_neox": {
        **TINY,
        "model_type": "gpt_neox",
        "intermediate_size": 48,
        "hidden_dropout": 0.1,
        "use_parallel_residual": True,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 67,
        "n_embd": 32,
        "n_layer": 5,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
        "scale_attn_by_inverse_layer_idx": True,
    },
    "opt": {
        "model_type": "opt",
        "vocab_size": 67,
        "hidden_size": 32,
        "word_embed_proj_dim": 16,
        "ffn_dim": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "init_std": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "layerdrop": 0.2,
    },
}


@pytest.fixture(params=sorted(CONFIGS))
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The config of one family after the other."""
    return dict(CONFIGS[request.param])


@pytest.fixture
def configs() -> dict[str, dict[str, Any]]:
    """All configs, by the names above."""
    return {name: dict(content) for name, content in CONFIGS.items()}
