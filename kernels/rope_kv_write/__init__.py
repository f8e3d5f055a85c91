"""After the qkv projection: norm of q and k, rotation of both, K and V into the cache.

A row of qkv is H query heads, then G key heads, then G value heads, each of D. The norms are RMSNorm, applied
when their weights are given: over each head, or over the whole row of all heads (OLMo 2, arXiv:2501.00656). Rotation pairs
element i with i + R/2 of the first R = cos_sin.shape[1] elements of a head (Hugging Face's rotate_half); the rest pass, all of
them where R is 0. Slot = block * S + offset; a negative slot is not written.

A cache of bf16 or int8 takes the nearest, halves to even; int8 with a scale per token and KV head, of K and of V: the number of
the largest magnitude (of equals the positive) / -128, or 1 if all are 0; q = round(x * (1 / scale)) in -128..127, all in fp32.
"""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype, expect_kv_cache


class Run(Protocol):
    """Every backend's `run`: outputs first."""

    def __call__(
        self,
        q_THD: Buffer,  # fp32, out, written whole
        kv_cache: Buffer,  # from Memory.kv_cache, out: only the slots of this step
        qkv_TX: Buffer,  # fp32 [T, (H + 2G) * D]
        cos_sin_TR: Buffer,  # fp32, from rope_table
        slots_T: Buffer,  # int32, each at most once
        q_norm: Buffer | None = None,  # fp32 [D] or [H * D]
        k_norm: Buffer | None = None,  # fp32 [D] or [G * D], as q_norm
        *,
        num_kv_heads: int,
        eps: float,
    ) -> None: ...


def check(
    q_THD: Buffer,
    kv_cache: Buffer,
    qkv_TX: Buffer,
    cos_sin_TR: Buffer,
    slots_T: Buffer,
    q_norm: Buffer | None = None,
    k_norm: Buffer | None = None,
    *,
    num_kv_heads: int,
    eps: float,
) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    T, H, D = expect("q", q_THD, None, None, None)
    expect("qkv", qkv_TX, T, (H + 2 * num_kv_heads) * D)
    _, R = expect("cos_sin", cos_sin_TR, T, None)
    expect("slots", slots_T, T)
    if R > D or R % 2:
        raise ValueError(f"cos_sin must have an even number of columns up to {D}, got {R}")
    expect_kv_cache(kv_cache, num_kv_heads, D)
    if H % num_kv_heads:
        raise ValueError(f"num_kv_heads ({num_kv_heads}) must divide {H} query heads")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm are given together or not at all")
    if q_norm is not None and k_norm is not None:
        is_per_head = tuple(q_norm.shape) == (D,)
        expect("q_norm", q_norm, D if is_per_head else H * D)
        expect("k_norm", k_norm, D if is_per_head else num_kv_heads * D)
        expect_dtype("q_norm", q_norm, "float32")
        expect_dtype("k_norm", k_norm, "float32")
    expect_dtype("slots", slots_T, "int32")
    for name, buffer in (("q", q_THD), ("qkv", qkv_TX), ("cos_sin", cos_sin_TR)):
        expect_dtype(name, buffer, "float32")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
