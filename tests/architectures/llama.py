"""See `tests.architectures`."""

import torch

from tests.architectures.parts import LINEAR, LLAMA, LLAMA3, config

TINY = {
    "llama-3-rope": {"rope_parameters": LLAMA3},
    "llama-gqa-1": {"num_key_value_heads": 4},
    "llama-gqa-2": {"num_key_value_heads": 2},
    "llama-gqa-4": {"num_key_value_heads": 1},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-wide-heads": {"head_dim": 24, "rope_parameters": LLAMA3},
    "llama-one-layer": {"num_hidden_layers": 1, "hidden_size": 40},
    "llama-bf16": {"dtype": torch.bfloat16},
    "llama-biases": {"attention_bias": True, "mlp_bias": True, "vocab_size": 263},
    "llama-linear-rope": {"rope_parameters": LINEAR, "hidden_act": "gelu"},
}
PUBLISHED = {
    "Llama-2-7b": config(
        "Llama", "llama", (4096, 11008, 32, 32, 32, 32000, 4096), rms_norm_eps=1e-5,
        rope_scaling=None, pretraining_tp=1, _name_or_path="meta-llama/Llama-2-7b-hf",
    ),
    "Llama-3.1-8B": config(
        "Llama", "llama", (4096, 14336, 32, 32, 8, 128256, 131072), **LLAMA, mlp_bias=False,
        rms_norm_eps=1e-5, rope_theta=500000.0, eos_token_id=[128001, 128008, 128009],
        rope_scaling={
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
    ),
    "SmolLM2-135M": config(
        "Llama", "llama", (576, 1536, 30, 9, 3, 49152, 8192), **LLAMA, mlp_bias=False,
        is_llama_config=True, rope_interleaved=False, rope_scaling=None, rope_theta=100000,
        rms_norm_eps=1e-5, **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    ),
}  # fmt: skip
