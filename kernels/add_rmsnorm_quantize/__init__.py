"""The residual add and the RMSNorm after it (`kernels.add_rmsnorm`), the norm's rows as bytes (`kernels.quantize`).

The same sum and bytes as the two ops give one after the other.
"""

from typing import Protocol

from vivace.kernels import add_rmsnorm, quantize
from vivace.kernels.buffer import Buffer


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        sum_TM: Buffer,  # fp32, out: the new residual
        q_TM: Buffer,  # uint8, out
        params_T2: Buffer,  # fp32, out: scale, zero
        x_TM: Buffer,  # fp32
        residual_TM: Buffer,  # fp32
        weight_M: Buffer,  # fp32
        *,
        eps: float,
    ) -> None: ...


def check(
    sum_TM: Buffer,
    q_TM: Buffer,
    params_T2: Buffer,
    x_TM: Buffer,
    residual_TM: Buffer,
    weight_M: Buffer,
    *,
    eps: float,
) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    add_rmsnorm.check(sum_TM, x_TM, x_TM, residual_TM, weight_M, eps=eps)
    quantize.check(q_TM, params_T2, x_TM)
