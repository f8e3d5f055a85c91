"""Emits causal self-attention over the paged cache."""

from dataclasses import dataclass

from vivace.engine.models.builder import Builder
from vivace.engine.models.program import Value
from vivace.engine.models.spec import AttentionSpec, QkNorm


@dataclass(frozen=True, slots=True)
class Places:
    """Inputs of a step that say where its tokens and their contexts lie; the same for all
    layers."""

    slots_T: Value
    block_tables_BX: Value
    query_starts: Value
    context_lens_B: Value


def emit_attention(
    b: Builder,
    layer: str,
    x_TM: Value,
    spec: AttentionSpec,
    *,
    cos_sin_TR: Value,
    places: Places,
) -> Value:
    """The heads' results side by side, [T, H * D]; `emit_output` turns them into the model size."""
    at = f"{layer}.attention"
    T, M = x_TM.shape
    assert isinstance(M, int)
    H, G, D = spec.num_heads, spec.num_kv_heads, spec.head_dim
    parts = (H * D, G * D, G * D)
    bias = b.weight(f"{at}.qkv_bias", sum(parts), parts=parts) if spec.qkv_bias else None
    qkv_TX = b.linear(x_TM, b.weight(f"{at}.qkv", sum(parts), M, parts=parts), bias)
    kv_cache = b.cache(f"{layer}.kv", G, D)
    q_THD = b.activation("rope_kv_write", T, H, D)
    b.call(
        "rope_kv_write",
        (q_THD, kv_cache),
        (qkv_TX, cos_sin_TR, places.slots_T, *_qk_norms(b, at, spec)),
        (("num_kv_heads", G), ("eps", spec.norm.eps)),
    )
    sinks = (b.weight(f"{at}.sinks", H),) if spec.sinks else ()
    out_THD = b.activation("attention", T, H, D)
    b.call(
        "attention",
        (out_THD,),
        (
            *(q_THD, kv_cache, places.block_tables_BX, places.query_starts, places.context_lens_B),
            *sinks,
        ),
        (
            ("num_kv_heads", G),
            ("scale", spec.scale),
            ("window", spec.window or 0),
            ("softcap", spec.softcap or 0.0),
        ),
    )
    return b.view(out_THD, T, H * D)


def emit_output(
    b: Builder, layer: str, heads_TX: Value, *, model_size: int, has_bias: bool
) -> Value:
    """The projection of the heads back to the model size."""
    at = f"{layer}.attention"
    X = heads_TX.shape[1]
    assert isinstance(X, int)
    bias = b.weight(f"{at}.out_bias", model_size) if has_bias else None
    return b.linear(heads_TX, b.weight(f"{at}.out", model_size, X), bias)


def _qk_norms(b: Builder, at: str, spec: AttentionSpec) -> tuple[Value, ...]:
    """The weights of the norms of q and k; `kernels.rope_kv_write` tells by their size what they
    are over."""
    if spec.qk_norm is QkNorm.NONE:
        return ()
    q_heads, k_heads = 1, 1
    if spec.qk_norm is QkNorm.ROW:
        q_heads, k_heads = spec.num_heads, spec.num_kv_heads
    return (
        b.weight(f"{at}.q_norm", q_heads * spec.head_dim, plus=spec.norm.offset),
        b.weight(f"{at}.k_norm", k_heads * spec.head_dim, plus=spec.norm.offset),
    )
