"""RMSNorm (`kernels.rmsnorm`), and its rows as bytes (`kernels.quantize`), with nothing in between kept.

The same bytes as the two ops give one after the other.
"""

from typing import Protocol

from vivace.kernels import quantize, rmsnorm
from vivace.kernels.buffer import Buffer


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        q_TM: Buffer,  # uint8, out
        params_T2: Buffer,  # fp32, out: scale, zero
        x_TM: Buffer,  # fp32
        weight_M: Buffer,  # fp32
        *,
        eps: float,
    ) -> None: ...


def check(q_TM: Buffer, params_T2: Buffer, x_TM: Buffer, weight_M: Buffer, *, eps: float) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    rmsnorm.check(x_TM, x_TM, weight_M, eps=eps)
    quantize.check(q_TM, params_T2, x_TM)
