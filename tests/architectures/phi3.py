"""See `tests.architectures`."""

from tests.architectures.parts import FACTORS, WIDE_HEADS, config

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 16 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}
TINY = {
    "phi3-partial": {
        "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.75},
        "sliding_window": 21,
        "tie_word_embeddings": True,
    },
    "phi3": {"hidden_size": 192, **WIDE_HEADS, "head_dim": None},
    "phi3-longrope": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 48},
}
PUBLISHED = {
    "Phi-3-mini-4k": config(
        "Phi3", "phi3", (3072, 8192, 32, 32, 32, 32064, 4096), attention_bias=False,
        attention_dropout=0.0, auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
        embd_pdrop=0.0, resid_pdrop=0.0, original_max_position_embeddings=4096,
        pad_token_id=32000, rms_norm_eps=1e-5, rope_scaling=None, rope_theta=10000.0,
        sliding_window=2047,
    ),
    "Phi-3-mini-128k": config(
        "Phi3", "phi3", (3072, 8192, 32, 32, 32, 32064, 131072), attention_dropout=0.0,
        auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}, embd_pdrop=0.0,
        resid_pdrop=0.0, original_max_position_embeddings=4096, rms_norm_eps=1e-5,
        rope_theta=10000.0, sliding_window=262144,
        rope_scaling={"type": "longrope", **FACTORS},
    ),
    "Phi-4-mini": config(
        "Phi3", "phi3", (3072, 8192, 32, 24, 8, 200064, 131072), attention_bias=False,
        attention_dropout=0.0, auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
        embd_pdrop=0.0, full_attn_mod=1, interpolate_factor=1, lm_head_bias=False,
        mlp_bias=False, original_max_position_embeddings=4096, partial_rotary_factor=0.75,
        resid_pdrop=0.0, rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=262144,
        tie_word_embeddings=True, rope_scaling={"type": "longrope", **FACTORS},
    ),
}  # fmt: skip
