"""See `tests.architectures`."""

from tests.architectures.parts import NARROW, config

TINY = {
    "mixtral-window": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 24,
        "head_dim": 128,
    },
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "mixtral-one-expert": {
        **NARROW,
        "num_local_experts": 1,
        "num_experts_per_tok": 1,
        "tie_word_embeddings": True,
    },
}
PUBLISHED = {
    "Mixtral-8x7B": config(
        "Mixtral", "mixtral", (4096, 14336, 32, 32, 8, 32000, 32768), attention_dropout=0.0,
        num_experts_per_tok=2, num_local_experts=8, output_router_logits=False,
        rms_norm_eps=1e-5, rope_theta=1000000.0, router_aux_loss_coef=0.02, sliding_window=None,
    ),
}  # fmt: skip
