"""What norm, rotation and the cache's writing mean, in fp32 on any device. Never optimise this file."""

import torch

from vivace.kernels.kv_read.reference import narrowed
from vivace.kernels.rmsnorm.reference import normed


def run(
    q_THD: torch.Tensor,
    kv_cache: torch.Tensor,
    qkv_TX: torch.Tensor,
    cos_sin_TR: torch.Tensor,
    slots_T: torch.Tensor,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    *,
    num_kv_heads: int,
    eps: float,
) -> None:
    """See `kernels.rope_kv_write`."""
    T, H, D = q_THD.shape
    G, S = num_kv_heads, kv_cache.shape[2]
    q, k, v = qkv_TX.view(T, H + 2 * G, D).split((H, G, G), dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = _normed(q, q_norm, eps), _normed(k, k_norm, eps)
    q_THD.copy_(_rotated(q, cos_sin_TR))
    written = slots_T >= 0
    slots = slots_T[written].long()
    rotated = _rotated(k, cos_sin_TR)
    kv_cache[slots // S, 0, slots % S] = narrowed(rotated[written], kv_cache.dtype)
    kv_cache[slots // S, 1, slots % S] = narrowed(v[written], kv_cache.dtype)


def _normed(x_THD: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if weight.shape[0] == x_THD.shape[2]:
        return normed(x_THD, weight, eps)
    return normed(x_THD.flatten(1), weight, eps).view_as(x_THD)


def _rotated(x_THD: torch.Tensor, cos_sin_TR: torch.Tensor) -> torch.Tensor:
    R = cos_sin_TR.shape[1]
    cos, sin = cos_sin_TR[:, None].chunk(2, dim=2)
    first, second = x_THD[:, :, :R].chunk(2, dim=2)
    rotated = (first * cos - second * sin, second * cos + first * sin, x_THD[:, :, R:])
    return torch.cat(rotated, dim=2)
