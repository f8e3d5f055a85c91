"""What projections by int4 experts mean, on any device. Never optimise this file."""

import torch

from vivace.kernels.linear_int4.reference import run as linear_int4
from vivace.kernels.memory.reference import QuantizedTensor


def run(
    out_TKN: torch.Tensor,
    q: torch.Tensor,
    params: torch.Tensor,
    experts_TK: torch.Tensor,
    weight_ENI: QuantizedTensor,
    bias_EN: torch.Tensor | None = None,
) -> None:
    """See `kernels.expert_linear_int4`. One expert at a time."""
    K = experts_TK.shape[1]
    q_TKI = q if q.dim() == 3 else q[:, None].expand(-1, K, -1)
    params_TK2 = params if params.dim() == 3 else params[:, None].expand(-1, K, -1)
    for e in experts_TK.unique().tolist():
        chosen_TK = experts_TK == e
        rows = out_TKN[chosen_TK]
        bias = None if bias_EN is None else bias_EN[e]
        linear_int4(rows, q_TKI[chosen_TK], params_TK2[chosen_TK], weight_ENI.expert(e), bias)
        out_TKN[chosen_TK] = rows
