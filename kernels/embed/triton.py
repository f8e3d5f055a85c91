"""Embedding on a GPU. Bound by bytes: a row read and written for each token."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vivace.kernels.gpu.launcher import Config, Launcher
from vivace.kernels.linear.triton import widen

DEFAULT = Config({"BLOCK": 1024})


@triton.jit
def gather_rows(
    out,  # fp32 [T, M]
    rows,  # int32 [T]
    table,  # fp32 or bf16 [V, M]
    scale,  # fp32
    M,
    UPCAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < M
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    x = widen(tl.load(table + row * M + column, mask=mask, other=0.0), UPCAST)
    tl.store(out + tl.program_id(0).to(tl.int64) * M + column, x * scale, mask=mask)


def bind(launcher: Launcher) -> Callable[..., None]:
    config = launcher.config("embed", "all", DEFAULT)

    def run(
        out_TM: torch.Tensor, tokens_T: torch.Tensor, table_VM: torch.Tensor, *, scale: float = 1.0
    ) -> None:
        """See `kernels.embed`."""
        T, M = out_TM.shape
        grid = (T, triton.cdiv(M, config.tiles["BLOCK"]))
        args = (out_TM, tokens_T, table_VM, scale, M)
        launcher.launch(gather_rows, grid, args, {"UPCAST": launcher.upcast}, config)

    return run
