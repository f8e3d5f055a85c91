"""Rows of activations as unsigned bytes: x ~ scale * (q - zero), each row (a token) with a scale and a zero of its own.

T tokens, K inputs. With lo = min(0, x) and hi = max(0, x) of a row: scale = (hi - lo) / 255, or 1 where that is 0;
zero = round(-lo / scale); q = round(x / scale) + zero, kept in 0..255; rounding is to even at the half. In fp32, each step
rounded once, and division by the scale is multiplication by 1 / scale: the same bytes on every CPU. A row that holds a NaN has
a NaN for a scale, one that holds an infinity an infinite one.
"""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        q_TK: Buffer,  # uint8, out
        params_T2: Buffer,  # fp32, out: scale, zero
        x_TK: Buffer,  # fp32
    ) -> None: ...


def check(q_TK: Buffer, params_T2: Buffer, x_TK: Buffer) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    T, K = expect("x", x_TK, None, None)
    expect("q", q_TK, T, K)
    expect("params", params_T2, T, 2)
    expect_dtype("q", q_TK, "uint8")
    expect_dtype("params", params_T2, "float32")
    expect_dtype("x", x_TK, "float32")
