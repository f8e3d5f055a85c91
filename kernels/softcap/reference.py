"""What a soft cap means, in fp32 on any device. Never optimise this file."""

import torch


def run(out_TV: torch.Tensor, x_TV: torch.Tensor, *, cap: float) -> None:
    """See `kernels.softcap`."""
    out_TV.copy_(cap * torch.tanh(x_TV / cap))
