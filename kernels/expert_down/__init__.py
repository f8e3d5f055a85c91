"""The second half of the experts' MLPs: `expert_linear` of rows [T, K, I], with the assignment of slots at hand.

`order` and `tiles` are `moe_assign`'s of these experts; they say how the work may be cut and change no result.
"""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype, expect_weight_dtype
from vivace.kernels.moe_assign import check_assignment


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        out_TKN: Buffer,  # fp32, out
        x_TKI: Buffer,  # fp32
        experts_TK: Buffer,  # int32
        order_TK: Buffer,  # int32
        tiles_TK3: Buffer,  # int32
        weight_ENI: Buffer,  # fp32, bf16 or fp16
        bias_EN: Buffer | None = None,  # fp32
    ) -> None: ...


def check(
    out_TKN: Buffer,
    x_TKI: Buffer,
    experts_TK: Buffer,
    order_TK: Buffer,
    tiles_TK3: Buffer,
    weight_ENI: Buffer,
    bias_EN: Buffer | None = None,
) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    E, N, width = expect("weight", weight_ENI, None, None, None)
    T, K = expect("experts", experts_TK, None, None)
    expect("x", x_TKI, T, K, width)
    expect("out", out_TKN, T, K, N)
    expect_dtype("experts", experts_TK, "int32")
    expect_dtype("out", out_TKN, "float32")
    expect_dtype("x", x_TKI, "float32")
    expect_weight_dtype("weight", weight_ENI, has_fp16=True)
    check_assignment(order_TK, tiles_TK3, T, K)
    if bias_EN is not None:
        expect("bias", bias_EN, E, N)
        expect_dtype("bias", bias_EN, "float32")
