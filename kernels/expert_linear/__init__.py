"""A projection by the experts that each token chose: out[t, k] = W[e] x + bias[e], e = experts[t, k].

E matrices of N outputs and I inputs. Every element has the additions of `linear` in the same order, whatever the other tokens
chose. An expert that nobody chose is not read. Experts outside 0..E-1 are the caller's bug: undefined.
"""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype, expect_weight_dtype


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        out_TKN: Buffer,  # fp32, out
        x: Buffer,  # fp32 [T, I]: every k reads the token's row; or [T, K, I]: each its own
        experts_TK: Buffer,  # int32
        weight_ENI: Buffer,  # fp32 or bf16
        bias_EN: Buffer | None = None,  # fp32
    ) -> None: ...


def check(
    out_TKN: Buffer,
    x: Buffer,
    experts_TK: Buffer,
    weight_ENI: Buffer,
    bias_EN: Buffer | None = None,
) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    E, N, width = expect("weight", weight_ENI, None, None, None)
    T, K = expect("experts", experts_TK, None, None)
    expect("x", x, *((T, K, width) if len(x.shape) == 3 else (T, width)))
    expect("out", out_TKN, T, K, N)
    expect_dtype("experts", experts_TK, "int32")
    expect_dtype("out", out_TKN, "float32")
    expect_dtype("x", x, "float32")
    expect_weight_dtype("weight", weight_ENI)
    if bias_EN is not None:
        expect("bias", bias_EN, E, N)
        expect_dtype("bias", bias_EN, "float32")
