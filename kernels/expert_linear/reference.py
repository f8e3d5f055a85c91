"""What the experts' projections mean, in fp32 on any device. Never optimise this file."""

import torch


def run(
    out_TKN: torch.Tensor,
    x: torch.Tensor,
    experts_TK: torch.Tensor,
    weight_ENI: torch.Tensor,
    bias_EN: torch.Tensor | None = None,
) -> None:
    """See `kernels.expert_linear`. One expert at a time."""
    x_TKI = x if x.dim() == 3 else x[:, None].expand(-1, experts_TK.shape[1], -1)
    for e in experts_TK.unique().tolist():
        chosen_TK = experts_TK == e
        rows = x_TKI[chosen_TK] @ weight_ENI[e].float().T
        out_TKN[chosen_TK] = rows if bias_EN is None else rows + bias_EN[e]
