"""See `tests.architectures`."""

from tests.architectures.parts import FULL, NARROW, SLIDING, YARN, config

GPT_OSS_YARN = YARN | {"factor": 32.0, "truncate": False, "rope_theta": 150000.0}
TINY = {
    "gpt-oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "rope_parameters": GPT_OSS_YARN,
        "head_dim": 64,
        "swiglu_limit": 0.5,
    },
    "gpt-oss-no-bias": {
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
    "gpt-oss-plain-rope": {
        **NARROW,
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "sliding_window": 30,
        "layer_types": [FULL, SLIDING],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "swiglu_limit": 0.5,
    },
}
PUBLISHED = {
    "gpt-oss-20b in bf16": config(
        "GptOss", "gpt_oss", (2880, 2880, 24, 64, 8, 201088, 131072), attention_bias=True,
        attention_dropout=0.0, experts_per_token=4, head_dim=64, initial_context_length=4096,
        layer_types=["sliding_attention", "full_attention"] * 12, num_experts_per_tok=4,
        num_local_experts=32, output_router_logits=False, pad_token_id=199999, rms_norm_eps=1e-5,
        rope_theta=150000, router_aux_loss_coef=0.9, sliding_window=128, swiglu_limit=7.0,
        unsloth_fixed=True,
        rope_scaling={
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
            "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False,
        },
    ),
}  # fmt: skip
