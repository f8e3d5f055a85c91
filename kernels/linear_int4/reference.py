"""What a projection by int4 means, on any device. Never optimise this file."""

import torch

from vivace.kernels.memory.reference import QuantizedTensor


def run(
    out_TN: torch.Tensor,
    q_TK: torch.Tensor,
    params_T2: torch.Tensor,
    weight_NK: QuantizedTensor,
    bias_N: torch.Tensor | None = None,
) -> None:
    """See `kernels.linear_int4`."""
    K, group = q_TK.shape[1], weight_NK.group
    assert group is not None
    total_TN, columns_N = torch.zeros_like(out_TN), out_TN.new_zeros(out_TN.shape[1])
    for g, first in enumerate(range(0, K, group)):
        part = slice(first, first + group)
        q_NG, scales_N = weight_NK.q[:, part].to(torch.int32), weight_NK.scales[:, g].float()
        sums_TN = q_TK[:, part].to(torch.int32) @ q_NG.T
        total_TN = total_TN + sums_TN.float() * scales_N
        columns_N = columns_N + q_NG.sum(dim=1).float() * scales_N
    y_TN = (total_TN - params_T2[:, 1:] * columns_N) * params_T2[:, :1]
    out_TN.copy_(y_TN if bias_N is None else y_TN + bias_N)
