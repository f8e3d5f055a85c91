"""What the rotary table means, on any device. Never optimise this file."""

import torch


def run(
    cos_sin_TD: torch.Tensor,
    positions_T: torch.Tensor,
    inv_freq: torch.Tensor,
    variants_T: torch.Tensor | None = None,
    *,
    scale: float,
) -> None:
    """See `kernels.rope_table`."""
    freq = inv_freq[:1] if variants_T is None else inv_freq[variants_T.long()]
    # fp64: libraries' fp32 sines differ
    angles = (positions_T.float()[:, None] * freq).double()
    cos_sin_TD.copy_(torch.cat((angles.cos(), angles.sin()), dim=1) * scale)
