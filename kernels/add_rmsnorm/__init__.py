"""The residual add and the RMSNorm after it: sum = x + residual, out = RMSNorm(sum)."""

from typing import Protocol

from vivace.kernels import rmsnorm
from vivace.kernels.buffer import Buffer, expect, expect_dtype


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        sum_TM: Buffer,  # fp32, out: the new residual
        out_TM: Buffer,  # fp32, out
        x_TM: Buffer,  # fp32
        residual_TM: Buffer,  # fp32
        weight_M: Buffer,  # fp32
        *,
        eps: float,
    ) -> None: ...


def check(
    sum_TM: Buffer,
    out_TM: Buffer,
    x_TM: Buffer,
    residual_TM: Buffer,
    weight_M: Buffer,
    *,
    eps: float,
) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    rmsnorm.check(out_TM, x_TM, weight_M, eps=eps)
    for name, buffer in (("sum", sum_TM), ("residual", residual_TM)):
        expect(name, buffer, *x_TM.shape)
        expect_dtype(name, buffer, "float32")
