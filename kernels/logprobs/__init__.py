"""Log-softmax of raw logits: of one given token a row, and of the K best, best first, ties to the lower id.

rank = 1 + how many tokens of the row have a larger logit than the given one. K may be 0. Sums in fp64.
"""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        chosen_R: Buffer,  # fp32, out
        ranks_R: Buffer,  # int32, out
        top_ids_RK: Buffer,  # int32, out
        top_logprobs_RK: Buffer,  # fp32, out
        logits_RV: Buffer,  # fp32
        tokens_R: Buffer,  # int32, in 0..V-1
    ) -> None: ...


def check(
    chosen_R: Buffer,
    ranks_R: Buffer,
    top_ids_RK: Buffer,
    top_logprobs_RK: Buffer,
    logits_RV: Buffer,
    tokens_R: Buffer,
) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    R, V = expect("logits", logits_RV, None, None)
    for name, buffer in (("chosen", chosen_R), ("ranks", ranks_R), ("tokens", tokens_R)):
        expect(name, buffer, R)
    _, K = expect("top_ids", top_ids_RK, R, None)
    expect("top_logprobs", top_logprobs_RK, R, K)
    if K > V:
        raise ValueError(f"K must be in 0..{V}, got {K}")
    for name, buffer in (("ranks", ranks_R), ("tokens", tokens_R), ("top_ids", top_ids_RK)):
        expect_dtype(name, buffer, "int32")
    for name, buffer in (
        ("chosen", chosen_R),
        ("logits", logits_RV),
        ("top_logprobs", top_logprobs_RK),
    ):
        expect_dtype(name, buffer, "float32")
