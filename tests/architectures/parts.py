"""What the configs of several architectures have in common."""

from typing import Any

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
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
NARROW = {"num_attention_heads": 8, "num_key_value_heads": 1}  # 8 query heads a KV head
WIDE_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
SLIDING, FULL = "sliding_attention", "full_attention"

COMMON: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
}


def config(
    architecture: str, model_type: str, sizes: tuple[int, ...], **values: Any
) -> dict[str, Any]:
    """`sizes`: hidden, intermediate, layers, heads, KV heads, vocabulary, positions."""
    keys = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
    )
    names = {"architectures": [f"{architecture}ForCausalLM"], "model_type": model_type}
    return COMMON | names | dict(zip(keys, sizes, strict=True)) | values


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The same without some keys."""
    return {key: value for key, value in values.items() if key not in keys}


LLAMA = {"attention_bias": False, "attention_dropout": 0.0, "pretraining_tp": 1}
QWEN = {"attention_dropout": 0.0, "use_sliding_window": False, "rms_norm_eps": 1e-6}
GEMMA = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "cache_implementation": "hybrid",
    "hidden_activation": "gelu_pytorch_tanh",
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
MOE = {"num_experts_per_tok": 8, "output_router_logits": False, "router_aux_loss_coef": 0.001}
FACTORS = {"short_factor": [1.0] * 48, "long_factor": [4.0] * 48}
