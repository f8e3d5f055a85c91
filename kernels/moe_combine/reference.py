"""What the joining of experts' rows means, in fp32 on any device. Never optimise this file."""

import torch


def run(
    out_TM: torch.Tensor,
    y_TKM: torch.Tensor,
    weights_TK: torch.Tensor,
    shared_TM: torch.Tensor | None = None,
    shared_gate_T1: torch.Tensor | None = None,
) -> None:
    """See `kernels.moe_combine`."""
    total = (weights_TK[:, :, None] * y_TKM).sum(1)
    if shared_TM is not None:
        gate = 1 if shared_gate_T1 is None else torch.sigmoid(shared_gate_T1)
        total = total + gate * shared_TM
    out_TM.copy_(total)
