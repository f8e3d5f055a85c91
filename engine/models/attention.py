"""Emits causal self-attention over the paged cache."""

from dataclasses import dataclass

from vivace.engine.models.builder import Builder
from vivace.engine.models.program import Value
from vivace.engine.models.spec import AttentionSpec


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
    T, M = x_TM.shape
    assert isinstance(M, int)
    H, G, D = spec.num_heads, spec.num_kv_heads, spec.head_dim
    parts = (H * D, G * D, G * D)
    qkv_TX = b.linear(x_TM, b.weight(f"{layer}.attention.qkv", sum(parts), M, parts=parts))
    norms: tuple[Value, ...] = ()
    if spec.qk_norm:
        norms = (
            b.weight(f"{layer}.attention.q_norm", D),
            b.weight(f"{layer}.attention.k_norm", D),
        )
    kv_cache = b.cache(f"{layer}.kv", G, D)
    q_THD = b.activation("rope_kv_write", T, H, D)
    b.call(
        "rope_kv_write",
        (q_THD, kv_cache),
        (qkv_TX, cos_sin_TR, places.slots_T, *norms),
        (("num_kv_heads", G), ("eps", spec.norm_eps)),
    )
    out_THD = b.activation("attention", T, H, D)
    b.call(
        "attention",
        (out_THD,),
        (q_THD, kv_cache, places.block_tables_BX, places.query_starts, places.context_lens_B),
        (("num_kv_heads", G), ("scale", spec.scale)),
    )
    return b.view(out_THD, T, H * D)


def emit_output(b: Builder, layer: str, heads_TX: Value, model_size: int) -> Value:
    """The projection of the heads back to the model size."""
    X = heads_TX.shape[1]
    assert isinstance(X, int)
    return b.linear(heads_TX, b.weight(f"{layer}.attention.out", model_size, X))
