"""What a unit's mean and deviation mean, on any device. Never optimise this file."""

import torch

from vivace.kernels.kv_read.reference import widened
from vivace.kernels.selection import unit_tokens


def run(
    meta: torch.Tensor, kv_cache: torch.Tensor, units: torch.Tensor, *, block_tokens: int
) -> None:
    """See `kernels.block_meta_update`."""
    U = unit_tokens(block_tokens)
    wanted = units[units >= 0].long()
    slots = wanted[:, None] * U + torch.arange(U, device=units.device)
    k = widened(kv_cache[slots // block_tokens, 0, slots % block_tokens], meta.shape[3])
    mean = k.mean(1)
    std = (k - mean[:, None]).square().mean(1).sqrt()
    meta[wanted] = torch.stack((mean, std), dim=2).to(meta.dtype)
