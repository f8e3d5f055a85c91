"""What the residual add and its norm as bytes mean, on any device. Never optimise this file."""

import torch

from vivace.kernels.quantize.reference import run as quantize
from vivace.kernels.rmsnorm.reference import normed


def run(
    sum_TM: torch.Tensor,
    q_TM: torch.Tensor,
    params_T2: torch.Tensor,
    x_TM: torch.Tensor,
    residual_TM: torch.Tensor,
    weight_M: torch.Tensor,
    *,
    eps: float,
) -> None:
    """See `kernels.add_rmsnorm_quantize`."""
    sum_TM.copy_(x_TM + residual_TM)
    quantize(q_TM, params_T2, normed(sum_TM, weight_M, eps))
