"""What the cache holds, on any device. Never optimise this file."""

import torch


def run(
    k_TGD: torch.Tensor, v_TGD: torch.Tensor, kv_cache: torch.Tensor, slots_T: torch.Tensor
) -> None:
    """See `kernels.kv_read`."""
    S = kv_cache.shape[2]
    slots = slots_T.long()
    D = k_TGD.shape[2]
    k_TGD.copy_(widened(kv_cache[slots // S, 0, slots % S], D))
    v_TGD.copy_(widened(kv_cache[slots // S, 1, slots % S], D))


def widened(heads: torch.Tensor, D: int) -> torch.Tensor:
    """Heads of the cache in fp32, of D elements each."""
    if heads.dtype != torch.int8:
        return heads.float()
    return heads[..., :D].float() * heads[..., D:].clone(
        memory_format=torch.contiguous_format
    ).view(torch.float32)


def narrowed(heads: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Heads as a cache of this type holds them; the inverse of `widened` but for rounding."""
    if dtype != torch.int8:
        return heads.to(dtype)
    low, high = heads.amin(-1, keepdim=True), heads.amax(-1, keepdim=True)
    scale = torch.where(high >= -low, high, low) / -128
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    q = (heads * (1 / scale)).round().clamp(-128, 127).nan_to_num(0).to(torch.int8)
    return torch.cat((q, scale.contiguous().view(torch.int8)), dim=-1)
