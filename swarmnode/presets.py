"""Ready-made model configs: plain data, the content of a Hugging Face `config.json`."""

from typing import Any

from swarmnode.tokenizer import BYTE_VOCAB_SIZE


def byte_llama_config() -> dict[str, Any]:
    """Return a Llama of 6 layers and about 1.5 M parameters for the byte-level tokenizer.

    Vocabulary 320: 257 ids are used, the rest rounds the matrix up to a multiple of 64.
    """
    end_id = BYTE_VOCAB_SIZE - 1
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 448,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": end_id,
        "eos_token_id": end_id,
    }
