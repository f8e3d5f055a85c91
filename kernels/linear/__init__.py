"""y = x W^T + bias: every projection of a model.

T tokens, N outputs, K inputs. Each output element has one order of additions, whatever T is; the bias comes last. In Triton on
tensor cores that holds within a bucket of T (its header has them): two kinds of instructions may add in two orders.
A weight of bf16 is one of fp32 whose last 16 bits are 0. Where the hardware multiplies bf16 (Triton), x is rounded to it first.
"""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype, expect_weight_dtype


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        out_TN: Buffer,  # fp32, out
        x_TK: Buffer,  # fp32
        weight_NK: Buffer,  # fp32 or bf16
        bias_N: Buffer | None = None,  # fp32
    ) -> None: ...


def check(out_TN: Buffer, x_TK: Buffer, weight_NK: Buffer, bias_N: Buffer | None = None) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    N, K = expect("weight", weight_NK, None, None)
    T, _ = expect("x", x_TK, None, K)
    expect("out", out_TN, T, N)
    expect_dtype("out", out_TN, "float32")
    expect_dtype("x", x_TK, "float32")
    expect_weight_dtype("weight", weight_NK)
    if bias_N is not None:
        expect("bias", bias_N, N)
        expect_dtype("bias", bias_N, "float32")
