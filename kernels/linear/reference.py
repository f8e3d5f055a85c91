"""What a projection means, in fp32 on any device. Never optimise this file."""

import torch


def run(
    out_TN: torch.Tensor,
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None = None,
) -> None:
    """See `kernels.linear`."""
    y_TN = x_TK @ weight_NK.float().T
    out_TN.copy_(y_TN if bias_N is None else y_TN + bias_N)
