"""See `tests.architectures`."""

from tests.architectures.parts import QWEN, config

TINY = {
    "qwen2-moe-dense-layers": {
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
    "qwen2-moe": {
        "num_experts": 6,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 56,
    },
    "qwen2-moe-window": {
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
}
PUBLISHED = {
    "Qwen1.5-MoE-A2.7B": config(
        "Qwen2Moe", "qwen2_moe", (2048, 5632, 24, 16, 16, 151936, 8192), **QWEN,
        decoder_sparse_step=1, max_window_layers=21, moe_intermediate_size=1408,
        norm_topk_prob=False, num_experts=60, output_router_logits=False, num_experts_per_tok=4,
        rope_theta=1000000.0, router_aux_loss_coef=0.001, shared_expert_intermediate_size=5632,
        sliding_window=32768,
    ),
}  # fmt: skip
