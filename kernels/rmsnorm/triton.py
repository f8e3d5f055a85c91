"""RMSNorm on a GPU. Bound by bytes: 8 for each element. A row is one program's, in registers, so M ends at about 32,768."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vivace.kernels.gpu.launcher import Config, Launcher

DEFAULT = Config(num_warps=8)


@triton.jit
def norm_factor(square_sum, count, eps):
    """1 / the root of the mean square, rounded as IEEE 754 has it: one per row, so its price is nothing."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(square_sum, count) + eps))


@triton.jit
def _rmsnorm(
    out,  # fp32 [T, M]
    x,  # fp32 [T, M]
    weight,  # fp32 [M]
    eps,  # fp32
    M,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    mask = column < M
    at = tl.program_id(0).to(tl.int64) * M + column
    row = tl.load(x + at, mask=mask, other=0.0)
    factor = norm_factor(tl.sum(row * row), M * 1.0, eps)
    scale = tl.load(weight + column, mask=mask, other=0.0)
    tl.store(out + at, row * factor * scale, mask=mask)


def bind(launcher: Launcher) -> Callable[..., None]:
    config = launcher.config("rmsnorm", "all", DEFAULT)

    def run(
        out_TM: torch.Tensor, x_TM: torch.Tensor, weight_M: torch.Tensor, *, eps: float
    ) -> None:
        """See `kernels.rmsnorm`."""
        T, M = out_TM.shape
        constexprs = {"BLOCK": triton.next_power_of_2(M)}
        launcher.launch(_rmsnorm, (T,), (out_TM, x_TM, weight_M, eps, M), constexprs, config)

    return run
