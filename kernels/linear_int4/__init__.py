"""y = x W^T + bias of quantized rows (`kernels.quantize`) by an int4 matrix in groups of inputs, each with a scale d:
out = scale * (sum over groups of d * (sum of q * w) - zero * (sum over groups of d * (sum of w))) + bias.

T tokens, N outputs, K inputs, at most 65,536 of them. The sums within a group are whole numbers, exact; groups are added up in
order, in fp32. So a row has the same bits in any batch and on every CPU.
"""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype
from vivace.kernels.quantized import MAX_INPUTS


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        out_TN: Buffer,  # fp32, out
        q_TK: Buffer,  # uint8
        params_T2: Buffer,  # fp32: scale, zero
        weight_NK: Buffer,  # int4, of `Memory.pack`
        bias_N: Buffer | None = None,  # fp32
    ) -> None: ...


def check(
    out_TN: Buffer,
    q_TK: Buffer,
    params_T2: Buffer,
    weight_NK: Buffer,
    bias_N: Buffer | None = None,
) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    N, K = expect("weight", weight_NK, None, None)
    if K > MAX_INPUTS:
        raise ValueError(f"weight must have at most {MAX_INPUTS} inputs, got {K}")
    T, _ = expect("q", q_TK, None, K)
    expect("params", params_T2, T, 2)
    expect("out", out_TN, T, N)
    expect_dtype("weight", weight_NK, "int4")
    expect_dtype("q", q_TK, "uint8")
    expect_dtype("params", params_T2, "float32")
    expect_dtype("out", out_TN, "float32")
    if bias_N is not None:
        expect("bias", bias_N, N)
        expect_dtype("bias", bias_N, "float32")
