"""What gated activations as bytes mean, on any device. Never optimise this file."""

import torch

from vivace.kernels.gated.reference import run as gated
from vivace.kernels.quantize.reference import run as quantize


def run(
    q: torch.Tensor,
    params: torch.Tensor,
    gate_up: torch.Tensor,
    *,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
) -> None:
    """See `kernels.gated_quantize`."""
    out = torch.empty_like(q, dtype=torch.float32)
    gated(out, gate_up, activation=activation, alpha=alpha, limit=limit)
    quantize(q, params, out)
