"""See `tests.architectures`."""

from tests.architectures.parts import NARROW, config

TINY = {
    "mistral-window": {"sliding_window": 20},
    "mistral-no-window": {"sliding_window": None, "head_dim": 8, "vocab_size": 263},
    "mistral-gqa-8": {**NARROW, "head_dim": 80, "sliding_window": 33},
}
PUBLISHED = {
    "Mistral-7B-v0.1": config(
        "Mistral", "mistral", (4096, 14336, 32, 32, 8, 32000, 32768),
        rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4096,
    ),
    "Mistral-7B-v0.3": config(
        "Mistral", "mistral", (4096, 14336, 32, 32, 8, 32768, 32768), attention_dropout=0.0,
        rms_norm_eps=1e-5, rope_theta=1000000.0, sliding_window=None,
    ),
}  # fmt: skip
