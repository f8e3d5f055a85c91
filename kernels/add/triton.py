"""Sums of residuals on a GPU. Bound by bytes: 12 for each element."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vivace.kernels.gpu.launcher import Config, Launcher

DEFAULT = Config({"BLOCK": 1024})


@triton.jit
def _add(
    out,  # fp32 [rows, M]
    x,  # fp32 [rows, M]
    residual,  # fp32 [rows, M]
    M,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * M + column
    mask = column < M
    total = tl.load(x + at, mask=mask, other=0.0) + tl.load(residual + at, mask=mask, other=0.0)
    tl.store(out + at, total, mask=mask)


def bind(launcher: Launcher) -> Callable[..., None]:
    config = launcher.config("add", "all", DEFAULT)

    def run(out: torch.Tensor, x: torch.Tensor, residual: torch.Tensor) -> None:
        """See `kernels.add`."""
        M = out.shape[-1]
        grid = (out.numel() // max(M, 1), triton.cdiv(M, config.tiles["BLOCK"]))
        launcher.launch(_add, grid, (out, x, residual, M), {}, config)

    return run
