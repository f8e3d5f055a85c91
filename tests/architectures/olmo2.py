"""See `tests.architectures`."""

from tests.architectures.parts import YARN, config

TINY = {
    "olmo2": {"head_dim": None},
    "olmo2-tied": {"head_dim": None, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "olmo2-biases": {
        "head_dim": None,
        "num_key_value_heads": 4,
        "attention_bias": True,
        "rope_parameters": YARN,
        "vocab_size": 263,
    },
}
PUBLISHED = {
    "OLMo-2-7B": config(
        "Olmo2", "olmo2", (4096, 11008, 32, 32, 32, 100352, 4096), attention_bias=False,
        attention_dropout=0.0, pad_token_id=100277, rms_norm_eps=1e-6, rope_scaling=None,
        rope_theta=500000,
    ),
}  # fmt: skip
