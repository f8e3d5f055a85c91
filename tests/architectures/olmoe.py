"""See `tests.architectures`."""

from tests.architectures.parts import MOE, NARROW, config

TINY = {
    "olmoe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 4,
        "head_dim": None,
    },
    "olmoe-64": {
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "intermediate_size": 16,
        "head_dim": None,
        "vocab_size": 263,
    },
    "olmoe-one-expert": {
        **NARROW,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "head_dim": None,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
}
PUBLISHED = {
    "OLMoE-1B-7B": config(
        "Olmoe", "olmoe", (2048, 1024, 16, 16, 16, 50304, 4096), **MOE, attention_bias=False,
        attention_dropout=0.0, clip_qkv=None, norm_topk_prob=False, num_experts=64,
        pad_token_id=1, rms_norm_eps=1e-5, rope_scaling=None, rope_theta=10000.0,
    ),
}  # fmt: skip
