"""What the second half of the experts' MLPs means, in fp32 on any device. Never optimise this file."""

import torch

from vivace.kernels.expert_linear import reference as expert_linear


def run(
    out_TKN: torch.Tensor,
    x_TKI: torch.Tensor,
    experts_TK: torch.Tensor,
    order_TK: torch.Tensor,
    tiles_TK3: torch.Tensor,
    weight_ENI: torch.Tensor,
    bias_EN: torch.Tensor | None = None,
) -> None:
    """See `kernels.expert_down`."""
    expert_linear.run(out_TKN, x_TKI, experts_TK, weight_ENI, bias_EN)
