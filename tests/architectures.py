"""The tiny configs that parity is tested with: transformers' `model_type`, and fields that differ from
`tests.tiny_models.SHAPE`. At least three for each architecture."""

from typing import Any

import torch

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # short, so that the tests' positions pass it
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
GPT_OSS_YARN = YARN | {"factor": 32.0, "truncate": False, "rope_theta": 150000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 16 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}
NARROW = {"num_attention_heads": 8, "num_key_value_heads": 1}  # 8 query heads a KV head
WIDE_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
SLIDING, FULL = "sliding_attention", "full_attention"

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama-gqa-1": ("llama", {"num_key_value_heads": 4}),
    "llama-gqa-2": ("llama", {"num_key_value_heads": 2}),
    "llama-gqa-4": ("llama", {"num_key_value_heads": 1}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-wide-heads": ("llama", {"head_dim": 24, "rope_parameters": LLAMA3}),
    "llama-one-layer": ("llama", {"num_hidden_layers": 1, "hidden_size": 40}),
    "llama-bf16": ("llama", {"dtype": torch.bfloat16}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "vocab_size": 263}),
    "llama-linear-rope": ("llama", {"rope_parameters": LINEAR, "hidden_act": "gelu"}),
    "mistral-window": ("mistral", {"sliding_window": 20}),
    "mistral-no-window": ("mistral", {"sliding_window": None, "head_dim": 8, "vocab_size": 263}),
    "mistral-gqa-8": ("mistral", {**NARROW, "head_dim": 80, "sliding_window": 33}),
    "qwen2-window": (
        "qwen2",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2": ("qwen2", {"num_key_value_heads": 4}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN, **NARROW, "vocab_size": 301}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-tied": ("qwen3", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3-window": (
        "qwen3",
        {
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 17,
            "layer_types": [SLIDING, FULL],
            "head_dim": 128,
        },
    ),
    "gemma2": (
        "gemma2",
        {"num_hidden_layers": 3, "sliding_window": 20, "query_pre_attn_scalar": 24},
    ),
    "gemma2-wide-heads": ("gemma2", {**WIDE_HEADS, "head_dim": 256, "sliding_window": 16}),
    "gemma2-no-caps": (
        "gemma2",
        {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "sliding_window": 31,
            "vocab_size": 263,
        },
    ),
    "gemma3": ("gemma3_text", {"num_hidden_layers": 7, "sliding_window": 18}),
    "gemma3-linear-rope": (
        "gemma3_text",
        {
            "rope_parameters": {
                FULL: LINEAR | {"rope_theta": 1e6, "factor": 8.0},
                SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
            },
            "layer_types": [SLIDING, FULL],
            "sliding_window": 16,
            "head_dim": 64,
        },
    ),
    "gemma3-gqa-8": (
        "gemma3_text",
        {
            **NARROW,
            "layer_types": [FULL, SLIDING],
            "sliding_window": 7,
            "query_pre_attn_scalar": 10,
            "final_logit_softcapping": 12.0,
            "attention_bias": True,
            "vocab_size": 277,
        },
    ),
    "phi3-partial": (
        "phi3",
        {
            "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.75},
            "sliding_window": 21,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": ("phi3", {"hidden_size": 192, **WIDE_HEADS, "head_dim": None}),
    "phi3-longrope": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 48},
    ),
    "mixtral-window": (
        "mixtral",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 24, "head_dim": 128},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "mixtral-one-expert": (
        "mixtral",
        {**NARROW, "num_local_experts": 1, "num_experts_per_tok": 1, "tie_word_embeddings": True},
    ),
    "qwen2-moe-dense-layers": (
        "qwen2_moe",
        {
            "num_hidden_layers": 4,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 16,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2-moe": (
        "qwen2_moe",
        {
            "num_experts": 6,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 56,
        },
    ),
    "qwen2-moe-window": (
        "qwen2_moe",
        {
            "num_hidden_layers": 3,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 24,
            "use_sliding_window": True,
            "sliding_window": 19,
            "max_window_layers": 2,
            "qkv_bias": False,
            "vocab_size": 263,
        },
    ),
    "qwen3-moe": (
        "qwen3_moe",
        {
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-moe-top-1": (
        "qwen3_moe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 24,
            "attention_bias": True,
            "num_key_value_heads": 1,
            "vocab_size": 269,
        },
    ),
    "qwen3-moe-window": (
        "qwen3_moe",
        {
            "num_hidden_layers": 3,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 22,
            "rope_parameters": YARN,
        },
    ),
    "olmoe": (
        "olmoe",
        {"num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 4, "head_dim": None},
    ),
    "olmoe-64": (
        "olmoe",
        {
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "intermediate_size": 16,
            "head_dim": None,
            "vocab_size": 263,
        },
    ),
    "olmoe-one-expert": (
        "olmoe",
        {
            **NARROW,
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "head_dim": None,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("olmo2", {"head_dim": None}),
    "olmo2-tied": (
        "olmo2",
        {"head_dim": None, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "olmo2-biases": (
        "olmo2",
        {
            "head_dim": None,
            "num_key_value_heads": 4,
            "attention_bias": True,
            "rope_parameters": YARN,
            "vocab_size": 263,
        },
    ),
    "smollm3-window": (
        "smollm3",
        {
            "num_hidden_layers": 3,
            "no_rope_layers": [1, 0, 1],
            "use_sliding_window": True,
            "sliding_window": 14,
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "smollm3-biases": (
        "smollm3",
        {
            **NARROW,
            "attention_bias": True,
            "mlp_bias": True,
            "no_rope_layer_interval": 2,
            "head_dim": 96,
            "vocab_size": 263,
        },
    ),
    "gpt-oss": (
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "rope_parameters": GPT_OSS_YARN,
            "head_dim": 64,
        },
    ),
    "gpt-oss-no-bias": (
        "gpt_oss",
        {
            "num_hidden_layers": 3,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "intermediate_size": 16,
            "sliding_window": 21,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "rope_parameters": GPT_OSS_YARN | {"truncate": True},
            "vocab_size": 263,
        },
    ),
    "gpt-oss-plain-rope": (
        "gpt_oss",
        {
            **NARROW,
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "sliding_window": 30,
            "layer_types": [FULL, SLIDING],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "swiglu_limit": 0.5,
        },
    ),
}

# The first of each architecture: the one that bends the cache and the blocks most.
ONE_OF_EACH = tuple({kind: name for name, (kind, _) in reversed(MODELS.items())}.values())
