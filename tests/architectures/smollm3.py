"""See `tests.architectures`."""

from tests.architectures.parts import NARROW, config, without

TINY = {
    "smollm3-window": {
        "num_hidden_layers": 3,
        "no_rope_layers": [1, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 14,
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
    },
    "smollm3": {"num_hidden_layers": 5},
    "smollm3-biases": {
        **NARROW,
        "attention_bias": True,
        "mlp_bias": True,
        "no_rope_layer_interval": 2,
        "head_dim": 96,
        "vocab_size": 263,
    },
}
PUBLISHED = {
    "SmolLM3-3B": without(
        config(
            "SmolLM3", "smollm3", (2048, 11008, 36, 16, 4, 128256, 65536), attention_bias=False,
            attention_dropout=0.0, layer_types=["full_attention"] * 36, max_window_layers=28,
            mlp_bias=False, no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9,
            pretraining_tp=2, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=5000000.0,
            sliding_window=None, use_sliding_window=False,
        ),
        "tie_word_embeddings",
    ),
}  # fmt: skip
