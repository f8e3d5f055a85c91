"""See `tests.architectures`."""

from tests.architectures.parts import NARROW, QWEN, YARN, config

TINY = {
    "qwen2-window": {
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen2": {"num_key_value_heads": 4},
    "qwen2-yarn": {"rope_parameters": YARN, **NARROW, "vocab_size": 301},
}
PUBLISHED = {
    "Qwen2.5-0.5B": config(
        "Qwen2", "qwen2", (896, 4864, 24, 14, 2, 151936, 32768), **QWEN, use_mrope=False,
        sliding_window=32768, max_window_layers=24, rope_theta=1000000.0, tie_word_embeddings=True,
    ),
    "Qwen2.5-7B with YaRN": config(
        "Qwen2", "qwen2", (3584, 18944, 28, 28, 4, 152064, 32768), **QWEN,
        sliding_window=131072, max_window_layers=28, rope_theta=1000000.0,
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    ),
}  # fmt: skip
