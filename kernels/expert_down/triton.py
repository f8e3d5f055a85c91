"""The second half of the experts' MLPs in Triton: the kernel of `expert_linear` on assigned tiles."""

from collections.abc import Callable

import torch

from vivace.kernels.expert_linear.triton import CANDIDATES, project
from vivace.kernels.gpu.launcher import Launcher

__all__ = ["CANDIDATES", "bind"]


def bind(launcher: Launcher) -> Callable[..., None]:
    """The op on one device."""

    def run(
        out_TKN: torch.Tensor,
        x_TKI: torch.Tensor,
        experts_TK: torch.Tensor,
        order_TK: torch.Tensor,
        tiles_TK3: torch.Tensor,
        weight_ENI: torch.Tensor,
        bias_EN: torch.Tensor | None = None,
    ) -> None:
        tensors = (out_TKN, x_TKI, experts_TK, order_TK, tiles_TK3, weight_ENI)
        project(launcher, "expert_down", tensors, bias_EN, is_assigned=True)

    return run
