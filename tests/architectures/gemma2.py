"""See `tests.architectures`."""

from tests.architectures.parts import GEMMA, WIDE_HEADS, config, without

TINY = {
    "gemma2": {"num_hidden_layers": 3, "sliding_window": 20, "query_pre_attn_scalar": 24},
    "gemma2-wide-heads": {**WIDE_HEADS, "head_dim": 256, "sliding_window": 16},
    "gemma2-no-caps": {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "sliding_window": 31,
        "vocab_size": 263,
    },
}
PUBLISHED = {
    "gemma-2-9b": without(
        config(
            "Gemma2", "gemma2", (3584, 14336, 42, 16, 8, 256000, 8192), **GEMMA,
            attn_logit_softcapping=50.0, final_logit_softcapping=30.0, head_dim=256,
            sliding_window=4096, sliding_window_size=4096, hidden_act="gelu_pytorch_tanh",
        ),
        "tie_word_embeddings",
    ),
}  # fmt: skip
