"""What RMSNorm as bytes means, on any device. Never optimise this file."""

import torch

from vivace.kernels.quantize.reference import run as quantize
from vivace.kernels.rmsnorm.reference import normed


def run(
    q_TM: torch.Tensor,
    params_T2: torch.Tensor,
    x_TM: torch.Tensor,
    weight_M: torch.Tensor,
    *,
    eps: float,
) -> None:
    """See `kernels.rmsnorm_quantize`."""
    quantize(q_TM, params_T2, normed(x_TM, weight_M, eps))
