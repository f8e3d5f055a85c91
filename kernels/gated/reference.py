"""What the gated activations mean, in fp32 on any device. Never optimise this file."""

import torch
from torch.nn.functional import gelu, silu


def run(
    out: torch.Tensor,
    gate_up: torch.Tensor,
    *,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
) -> None:
    """See `kernels.gated`."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "clamped_swiglu":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        out.copy_(gate * torch.sigmoid(alpha * gate) * (up + 1))
    elif activation == "silu":
        out.copy_(silu(gate) * up)
    else:
        out.copy_(gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up)
