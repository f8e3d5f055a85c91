"""See `tests.architectures`."""

from tests.architectures.parts import FULL, QWEN, SLIDING, config

TINY = {
    "qwen3": {"head_dim": 32},
    "qwen3-tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3-window": {
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 17,
        "layer_types": [SLIDING, FULL],
        "head_dim": 128,
    },
}
PUBLISHED = {
    "Qwen3-8B": config(
        "Qwen3", "qwen3", (4096, 12288, 36, 32, 8, 151936, 40960), **QWEN, attention_bias=False,
        head_dim=128, max_window_layers=36, rope_scaling=None, rope_theta=1000000,
        sliding_window=None,
    ),
}  # fmt: skip
