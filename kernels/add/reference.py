"""What the adding of a residual means, in fp32 on any device. Never optimise this file."""

import torch


def run(out: torch.Tensor, x: torch.Tensor, residual: torch.Tensor) -> None:
    """See `kernels.add`."""
    out.copy_(x + residual)
