"""Taking rows on a GPU: an embedding in them. Bound by bytes."""

from collections.abc import Callable

import torch
import triton

from vivace.kernels.embed.triton import DEFAULT, gather_rows
from vivace.kernels.gpu.launcher import Launcher


def bind(launcher: Launcher) -> Callable[..., None]:
    config = launcher.config("take_rows", "all", DEFAULT)

    def run(out_RM: torch.Tensor, x_TM: torch.Tensor, rows_R: torch.Tensor) -> None:
        """See `kernels.take_rows`."""
        R, M = out_RM.shape
        grid = (R, triton.cdiv(M, config.tiles["BLOCK"]))
        args, constexprs = (out_RM, rows_R, x_TM, 1.0, M), {"UPCAST": launcher.upcast}
        launcher.launch(gather_rows, grid, args, constexprs, config)

    return run
