"""What the cache holds, on any device. Never optimise this file."""

import torch


def run(
    k_TGD: torch.Tensor, v_TGD: torch.Tensor, kv_cache: torch.Tensor, slots_T: torch.Tensor
) -> None:
    """See `kernels.kv_read`."""
    S = kv_cache.shape[2]
    slots = slots_T.long()
    k_TGD.copy_(kv_cache[slots // S, 0, slots % S])
    v_TGD.copy_(kv_cache[slots // S, 1, slots % S])
