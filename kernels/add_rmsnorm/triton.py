"""The residual add and its norm on a GPU. Bound by bytes: 16 for each element, the row kept in registers as in rmsnorm."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vivace.kernels.gpu.launcher import Launcher
from vivace.kernels.rmsnorm.triton import DEFAULT, norm_factor


@triton.jit
def _add_rmsnorm(
    total,  # fp32 [T, M]
    out,  # fp32 [T, M]
    x,  # fp32 [T, M]
    residual,  # fp32 [T, M]
    weight,  # fp32 [M]
    eps,  # fp32
    M,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    mask = column < M
    at = tl.program_id(0).to(tl.int64) * M + column
    row = tl.load(x + at, mask=mask, other=0.0) + tl.load(residual + at, mask=mask, other=0.0)
    tl.store(total + at, row, mask=mask)
    factor = norm_factor(tl.sum(row * row), M * 1.0, eps)
    scale = tl.load(weight + column, mask=mask, other=0.0)
    tl.store(out + at, row * factor * scale, mask=mask)


def bind(launcher: Launcher) -> Callable[..., None]:
    config = launcher.config("add_rmsnorm", "all", DEFAULT)

    def run(
        sum_TM: torch.Tensor,
        out_TM: torch.Tensor,
        x_TM: torch.Tensor,
        residual_TM: torch.Tensor,
        weight_M: torch.Tensor,
        *,
        eps: float,
    ) -> None:
        """See `kernels.add_rmsnorm`."""
        T, M = out_TM.shape
        args = (sum_TM, out_TM, x_TM, residual_TM, weight_M, eps, M)
        constexprs = {"BLOCK": triton.next_power_of_2(M)}
        launcher.launch(_add_rmsnorm, (T,), args, constexprs, config)

    return run
