"""RMSNorm: out = x * rsqrt(mean(x^2) + eps) * weight, per row. arXiv:1910.07467, eq. 4."""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        out_TM: Buffer,  # fp32, out
        x_TM: Buffer,  # fp32
        weight_M: Buffer,  # fp32
        *,
        eps: float,
    ) -> None: ...


def check(out_TM: Buffer, x_TM: Buffer, weight_M: Buffer, *, eps: float) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    (M,) = expect("weight", weight_M, None)
    T, _ = expect("x", x_TM, None, M)
    expect("out", out_TM, T, M)
    for name, buffer in (("out", out_TM), ("x", x_TM), ("weight", weight_M)):
        expect_dtype(name, buffer, "float32")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
