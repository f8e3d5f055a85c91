"""Norm, rotation and the cache's writing on a GPU, one launch. Bound by bytes: qkv read once, q and the cache written.

Three programs a token: for its queries, keys and values, all heads of one in registers, so H * D ends at about 32,768.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vivace.kernels.gpu.launcher import Config, Launcher
from vivace.kernels.linear.triton import cast
from vivace.kernels.rmsnorm.triton import norm_factor

DEFAULT = Config(num_warps=8)


@triton.jit
def _rotated(
    row,  # fp32 [heads * D]
    cos_sin,  # fp32 [R]
    norm,  # fp32 [D] or [heads * D]; not read without NORM
    heads: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    NORM: tl.constexpr,  # "none", "head" or "row"
    eps,  # fp32
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The heads of a token, normed and rotated. [HEADS, BLOCK]"""
    head, d = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask = (head < heads) & (d < D)
    half: tl.constexpr = R // 2
    other = tl.where(d < half, d + half, tl.where(d < R, d - half, d))  # rotates with d
    x = tl.load(row + head * D + d, mask=mask, other=0.0)
    y = tl.load(row + head * D + other, mask=mask, other=0.0)
    if NORM != "none":
        if NORM == "head":
            factor = norm_factor(tl.sum(x * x, axis=1), D * 1.0, eps)[:, None]
            weights = norm
        else:
            factor = norm_factor(tl.sum(x * x), heads * D * 1.0, eps)
            weights = norm + head * D
        x = x * factor * tl.load(weights + d, mask=mask, other=0.0)
        y = y * factor * tl.load(weights + other, mask=mask, other=0.0)
    if R > 0:
        pair = tl.where(d < half, d, d - half)
        cos = tl.load(cos_sin + pair, mask=d < R, other=1.0)
        sin = tl.load(cos_sin + half + pair, mask=d < R, other=0.0)
        x = x * cos + tl.where(d < half, -y, y) * sin
    return x


@triton.jit
def _write(
    at,  # [HEADS, 1] pointers to the heads of a token in the cache
    x,  # fp32 [HEADS, BLOCK]
    heads: tl.constexpr,
    D: tl.constexpr,
    UPCAST: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store heads in the cache's type; see the contract for int8."""
    head, d = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    is_head = head < heads
    mask = is_head & (d < D)
    if at.dtype.element_ty == tl.int8:
        low = tl.min(tl.where(d < D, x, float("inf")), axis=1)[:, None]
        high = tl.max(tl.where(d < D, x, -float("inf")), axis=1)[:, None]
        scale = tl.where(high >= -low, high, low) * (-1.0 / 128)
        scale = tl.where(scale == 0, 1.0, scale)
        is_nan = ((x != x) & (d < D)).to(tl.int32)  # minimum and maximum pass it over
        scale = tl.where(tl.max(is_nan, axis=1)[:, None] > 0, float("nan"), scale)
        q = x * tl.div_rn(1.0, scale)
        q = tl.where(q > 127.0, 127.0, tl.where(q < -128.0, -128.0, q))
        q = tl.where(q == q, q, 0.0)
        q = (q + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest, halves to even
        tl.store(at + d, q.to(tl.int8), mask=mask)
        place = tl.arange(0, 4)[None, :]  # byte by byte: a head may begin anywhere
        of_scale = (scale.to(tl.int32, bitcast=True) >> (8 * place)) & 0xFF
        tl.store(at + D + place, of_scale.to(tl.int8), mask=is_head)
    else:
        tl.store(at + d, cast(x, at.dtype.element_ty, UPCAST), mask=mask)


@triton.jit
def _rope_kv_write(
    q,  # fp32 [T, H, D]
    kv_cache,  # fp32, bf16 or int8 [N, 2, G, S, D or D + 4]
    qkv,  # fp32 [T, (H + 2G) * D]
    cos_sin,  # fp32 [T, R]
    slots,  # int32 [T]
    q_norm,  # fp32 [D] or [H * D]; not read without NORM
    k_norm,  # fp32 [D] or [G * D]
    eps,  # fp32
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    NORM: tl.constexpr,
    IS_INT8: tl.constexpr,
    UPCAST: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row, table = qkv + t * ((H + 2 * G) * D), cos_sin + t * R
    d = tl.arange(0, BLOCK)[None, :]
    if part == 0:
        head = tl.arange(0, Q_HEADS)[:, None]
        rotated = _rotated(row, table, q_norm, H, D, R, NORM, eps, Q_HEADS, BLOCK)
        tl.store(q + (t * H + head) * D + d, rotated, mask=(head < H) & (d < D))
    else:
        slot = tl.load(slots + tl.program_id(0)).to(tl.int64)
        if slot >= 0:
            head = tl.arange(0, KV_HEADS)[:, None]
            width = D + 4 if IS_INT8 else D
            at = kv_cache + (((slot // S * 2 + part - 1) * G + head) * S + slot % S) * width
            if part == 1:
                row += H * D
                k = _rotated(row, table, k_norm, G, D, R, NORM, eps, KV_HEADS, BLOCK)
                _write(at, k, G, D, UPCAST, KV_HEADS, BLOCK)
            else:
                mask = (head < G) & (d < D)
                v = tl.load(row + (H + G + head) * D + d, mask=mask, other=0.0)
                _write(at, v, G, D, UPCAST, KV_HEADS, BLOCK)


def bind(launcher: Launcher) -> Callable[..., None]:
    config = launcher.config("rope_kv_write", "all", DEFAULT)

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
        kind = "none" if q_norm is None else "head" if q_norm.shape[0] == D else "row"
        norms = (qkv_TX, qkv_TX) if q_norm is None else (q_norm, k_norm)
        constexprs = {
            "H": H,
            "G": num_kv_heads,
            "D": D,
            "R": cos_sin_TR.shape[1],
            "S": kv_cache.shape[3],
            "NORM": kind,
            "IS_INT8": kv_cache.dtype == torch.int8,
            "UPCAST": launcher.upcast,
            "Q_HEADS": triton.next_power_of_2(H),
            "KV_HEADS": triton.next_power_of_2(num_kv_heads),
            "BLOCK": triton.next_power_of_2(D),
        }
        args = (q_THD, kv_cache, qkv_TX, cos_sin_TR, slots_T, *norms, eps)
        launcher.launch(_rope_kv_write, (T, 3), args, constexprs, config)

    return run
