"""What the gated activation means, in fp32 on any device. Never optimise this file."""

import torch


def run(out_TF: torch.Tensor, gate_up_T2F: torch.Tensor) -> None:
    """See `kernels.silu_mul`."""
    gate, up = gate_up_T2F.chunk(2, dim=1)
    out_TF.copy_(torch.nn.functional.silu(gate) * up)
