"""What a projection means, in fp32 on any device. Never optimise this file."""

import torch


def run(out_TN: torch.Tensor, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> None:
    """See `kernels.linear`."""
    out_TN.copy_(x_TK @ weight_NK.T)
