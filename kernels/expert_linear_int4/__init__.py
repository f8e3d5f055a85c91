"""A projection of quantized rows by the int4 matrices of the experts that each token chose (`kernels.expert_linear`).

Every element is what `kernels.linear_int4` makes of that row and that expert's matrix, to the bit, whatever the other tokens
chose. An expert that nobody chose is not read. Experts outside 0..E-1 are the caller's bug: undefined.
"""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect_dtype
from vivace.kernels.quantized import expect_expert_rows


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        out_TKN: Buffer,  # fp32, out
        q: Buffer,  # uint8 [T, I]: every k reads the token's row; or [T, K, I]: each its own
        params: Buffer,  # fp32 [T, 2] or [T, K, 2]: scale, zero
        experts_TK: Buffer,  # int32
        weight_ENI: Buffer,  # int4, of `Memory.pack`
        bias_EN: Buffer | None = None,  # fp32
    ) -> None: ...


def check(
    out_TKN: Buffer,
    q: Buffer,
    params: Buffer,
    experts_TK: Buffer,
    weight_ENI: Buffer,
    bias_EN: Buffer | None = None,
) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    expect_expert_rows(out_TKN, q, params, experts_TK, weight_ENI, bias_EN)
    expect_dtype("weight", weight_ENI, "int4")
