"""See `tests.architectures`."""

from tests.architectures.parts import FULL, GEMMA, LINEAR, NARROW, SLIDING, config, without

TINY = {
    "gemma3": {"num_hidden_layers": 7, "sliding_window": 18},
    "gemma3-linear-rope": {
        "rope_parameters": {
            FULL: LINEAR | {"rope_theta": 1e6, "factor": 8.0},
            SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
        },
        "layer_types": [SLIDING, FULL],
        "sliding_window": 16,
        "head_dim": 64,
    },
    "gemma3-gqa-8": {
        **NARROW,
        "layer_types": [FULL, SLIDING],
        "sliding_window": 7,
        "query_pre_attn_scalar": 10,
        "final_logit_softcapping": 12.0,
        "attention_bias": True,
        "vocab_size": 277,
    },
}
PUBLISHED = {
    "gemma-3-1b-it": without(
        config(
            "Gemma3", "gemma3_text", (1152, 6912, 26, 4, 1, 262144, 32768),
            **(GEMMA | {"rope_theta": 1000000}), attn_logit_softcapping=None,
            final_logit_softcapping=None, head_dim=256, rope_local_base_freq=10000,
            rope_scaling=None, sliding_window=512, sliding_window_pattern=6, eos_token_id=[1, 106],
        ),
        "tie_word_embeddings",
    ),
    "gemma-3-270m": without(
        config(
            "Gemma3", "gemma3_text", (640, 2048, 18, 4, 1, 262144, 32768),
            **(GEMMA | {"rope_theta": 1000000.0}), _sliding_window_pattern=6,
            attn_logit_softcapping=None, final_logit_softcapping=None, head_dim=256,
            rope_local_base_freq=10000.0, rope_scaling=None, sliding_window=512,
            layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
            use_bidirectional_attention=False,
        ),
        "tie_word_embeddings",
    ),
}  # fmt: skip
