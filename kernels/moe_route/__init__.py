"""Which K of E experts each token goes to, best first, and with what weights.

`scoring` turns logits into scores: softmax over all E, or sigmoid of each; in fp64, rounded once, so that near-ties
fall the same way everywhere. Experts are ranked by logit, or by score + bias where there is a bias, which chooses and
weighs nothing (arXiv:2412.19437, section 2.1.2). Ties go to the lower expert. In groups, equal in size and side by side,
only experts of the `top_groups` best can be chosen; a group is worth its best expert's rank, with a bias the sum of its
two best; ties go to the lower group. Weights are the scores of the chosen; renormalized: the softmax of the chosen
logits, or the sigmoids over their sum + 1e-20. Last, times `scale`. To `loads` is added how many tokens chose each expert.
"""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype

SCORINGS = ("softmax", "sigmoid")


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        weights_TK: Buffer,  # fp32, out
        experts_TK: Buffer,  # int32, out, distinct within a row
        logits_TE: Buffer,  # fp32
        loads_E: Buffer | None = None,  # int64, in and out
        bias_E: Buffer | None = None,  # fp32
        *,
        scoring: str,  # one of SCORINGS
        renormalize: bool,
        scale: float = 1.0,
        num_groups: int = 1,
        top_groups: int = 1,
    ) -> None: ...


def check(
    weights_TK: Buffer,
    experts_TK: Buffer,
    logits_TE: Buffer,
    loads_E: Buffer | None = None,
    bias_E: Buffer | None = None,
    *,
    scoring: str,
    renormalize: bool,
    scale: float = 1.0,
    num_groups: int = 1,
    top_groups: int = 1,
) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    T, E = expect("logits", logits_TE, None, None)
    _, K = expect("weights", weights_TK, T, None)
    expect("experts", experts_TK, T, K)
    expect_dtype("logits", logits_TE, "float32")
    expect_dtype("weights", weights_TK, "float32")
    expect_dtype("experts", experts_TK, "int32")
    if loads_E is not None:
        expect("loads", loads_E, E)
        expect_dtype("loads", loads_E, "int64")
    if bias_E is not None:
        expect("bias", bias_E, E)
        expect_dtype("bias", bias_E, "float32")
    if scoring not in SCORINGS:
        raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, got {scoring!r}")
    if num_groups < 1 or E % num_groups:
        raise ValueError(f"num_groups ({num_groups}) must divide {E} experts")
    if not 1 <= top_groups <= num_groups:
        raise ValueError(f"top_groups must be 1 to {num_groups}, got {top_groups}")
    if not 1 <= K <= top_groups * (E // num_groups):
        raise ValueError(
            f"experts per token must be 1 to {top_groups * (E // num_groups)} "
            f"({top_groups} of {num_groups} groups of {E} experts), got {K}"
        )
