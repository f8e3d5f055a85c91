"""See `tests.architectures`."""

from tests.architectures.parts import MOE, QWEN, YARN, config

TINY = {
    "qwen3-moe": {
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    "qwen3-moe-top-1": {
        "num_experts": 5,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 24,
        "attention_bias": True,
        "num_key_value_heads": 1,
        "vocab_size": 269,
    },
    "qwen3-moe-window": {
        "num_hidden_layers": 3,
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
        "use_sliding_window": True,
        "sliding_window": 22,
        "rope_parameters": YARN,
    },
}
PUBLISHED = {
    "Qwen3-30B-A3B": config(
        "Qwen3Moe", "qwen3_moe", (2048, 6144, 48, 32, 4, 151936, 40960), **QWEN, **MOE,
        attention_bias=False, decoder_sparse_step=1, head_dim=128, max_window_layers=48,
        mlp_only_layers=[], moe_intermediate_size=768, norm_topk_prob=True, num_experts=128,
        rope_scaling=None, rope_theta=1000000.0, sliding_window=None,
    ),
    "Qwen3-Coder-30B-A3B": config(
        "Qwen3Moe", "qwen3_moe", (2048, 5472, 48, 32, 4, 151936, 262144), **QWEN, **MOE,
        attention_bias=False, decoder_sparse_step=1, head_dim=128, max_window_layers=28,
        mlp_only_layers=[], moe_intermediate_size=768, norm_topk_prob=True, num_experts=128,
        rope_scaling=None, rope_theta=10000000, sliding_window=None, qkv_bias=False,
        shared_expert_intermediate_size=0, use_qk_norm=True,
    ),
}  # fmt: skip
