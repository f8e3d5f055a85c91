"""Soft caps on a GPU. Bound by bytes: 8 for each element."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vivace.kernels.gated.triton import DEFAULT, tanh
from vivace.kernels.gpu.launcher import Launcher


@triton.jit
def _softcap(
    out,  # fp32 [T, V]
    x,  # fp32 [T, V]
    cap,  # fp32
    V,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < V
    at = tl.program_id(0).to(tl.int64) * V + column
    share = tl.div_rn(tl.load(x + at, mask=mask, other=0.0), cap)
    tl.store(out + at, cap * tanh(share), mask=mask)


def bind(launcher: Launcher) -> Callable[..., None]:
    config = launcher.config("softcap", "all", DEFAULT)

    def run(out_TV: torch.Tensor, x_TV: torch.Tensor, *, cap: float) -> None:
        """See `kernels.softcap`."""
        T, V = out_TV.shape
        grid = (T, triton.cdiv(V, config.tiles["BLOCK"]))
        launcher.launch(_softcap, grid, (out_TV, x_TV, cap, V), {}, config)

    return run
