"""Rows of activations as unsigned bytes: x ~ scale * (q - zero), each row with a scale and a zero of its own.

T tokens, K inputs; or [T, k, K], k rows for each token. With lo = min(0, x) and hi = max(0, x) of a row:
scale = (hi - lo) / 255, or 1 where that is no normal number, which makes the row 0; zero = round(-lo / scale);
q = round(x / scale) + zero, kept in 0..255; rounding is to even at the half. In fp32, each step rounded once, and division
by the scale is multiplication by 1 / scale: the same bytes on every CPU. A row that holds a NaN has a NaN for a scale, one that
holds an infinity an infinite one.
"""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype
from vivace.kernels.quantized import MAX_INPUTS


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        q: Buffer,  # uint8 [T, K] or [T, k, K], out
        params: Buffer,  # fp32 [T, 2] or [T, k, 2], out: scale, zero
        x: Buffer,  # fp32 [T, K] or [T, k, K]
    ) -> None: ...


def check(q: Buffer, params: Buffer, x: Buffer) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    *rows, K = expect("x", x, *((None,) * max(2, min(3, len(x.shape)))))
    if K > MAX_INPUTS:
        raise ValueError(f"x must have at most {MAX_INPUTS} inputs, got {K}")
    expect("q", q, *rows, K)
    expect("params", params, *rows, 2)
    expect_dtype("q", q, "uint8")
    expect_dtype("params", params, "float32")
    expect_dtype("x", x, "float32")
