"""What the residual add and its norm mean, in fp32 on any device. Never optimise this file."""

import torch

from vivace.kernels.rmsnorm.reference import normed


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
    sum_TM.copy_(x_TM + residual_TM)
    out_TM.copy_(normed(sum_TM, weight_M, eps))
