"""What the first half of the experts' MLPs means, in fp32 on any device. Never optimise this file."""

import torch

from vivace.kernels.expert_linear import reference as expert_linear
from vivace.kernels.gated import reference as gated


def run(
    out_TKF: torch.Tensor,
    x_TM: torch.Tensor,
    experts_TK: torch.Tensor,
    order_TK: torch.Tensor,
    tiles_TK3: torch.Tensor,
    gate_up_ENM: torch.Tensor,
    bias_EN: torch.Tensor | None = None,
    *,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
) -> None:
    """See `kernels.expert_gated`."""
    gate_up_TKN = out_TKF.new_empty((*experts_TK.shape, gate_up_ENM.shape[1]))
    expert_linear.run(gate_up_TKN, x_TM, experts_TK, gate_up_ENM, bias_EN)
    gated.run(out_TKF, gate_up_TKN, activation=activation, alpha=alpha, limit=limit)
