"""What a projection by int8 means, on any device. Never optimise this file."""

import torch

from vivace.kernels.memory.reference import QuantizedTensor


def run(
    out_TN: torch.Tensor,
    q_TK: torch.Tensor,
    params_T2: torch.Tensor,
    weight_NK: QuantizedTensor,
    bias_N: torch.Tensor | None = None,
) -> None:
    """See `kernels.linear_int8`."""
    sums_TN = q_TK.to(torch.int32) @ weight_NK.q.to(torch.int32).T
    columns_N = weight_NK.q.sum(dim=1, dtype=torch.int32)
    scale_T1, zero_T1 = params_T2[:, :1], params_T2[:, 1:]
    whole_TN = sums_TN - zero_T1.to(torch.int32) * columns_N
    y_TN = whole_TN.to(torch.float32) * (scale_T1 * weight_NK.scales)
    out_TN.copy_(y_TN if bias_N is None else y_TN + bias_N)
