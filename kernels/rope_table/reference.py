"""What the rotary table means, on any device. Never optimise this file."""

import torch


def run(
    cos_sin_TD: torch.Tensor, positions_T: torch.Tensor, inv_freq: torch.Tensor, *, scale: float
) -> None:
    """See `kernels.rope_table`."""
    angles = (
        positions_T.float()[:, None] * inv_freq
    ).double()  # fp64: libraries' fp32 sines differ
    cos_sin_TD.copy_(torch.cat((angles.cos(), angles.sin()), dim=1) * scale)
