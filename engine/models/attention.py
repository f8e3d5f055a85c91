"""Emits causal self-attention over the paged cache. In a layer without a window a request may be sparse: then it attends to
what is selected of its context (`kernels.selection`)."""

from dataclasses import dataclass

from vivace.engine.models.builder import Builder
from vivace.engine.models.program import NOTHING, Value
from vivace.engine.models.spec import AttentionSpec, QkNorm
from vivace.kernels.buffer import DType
from vivace.kernels.selection import unit_tokens


@dataclass(frozen=True, slots=True)
class Places:
    """Inputs of a step that say where its tokens and their contexts lie, and who is sparse; the same for all
    layers."""

    slots_T: Value
    block_tables_BX: Value
    query_starts: Value
    context_lens_B: Value
    meta_units_U: Value  # of the cache, whose metadata is made anew
    sparse_budgets_B: Value  # units; 0: dense
    sparse_dense_layers_B: Value
    sparse_measured_B: Value


def emit_attention(
    b: Builder,
    layer: int,
    x_TM: Value,
    spec: AttentionSpec,
    *,
    cos_sin_TR: Value,
    places: Places,
) -> Value:
    """The heads' results side by side, [T, H * D]; `emit_output` turns them into the model size."""
    at = f"layers.{layer}.attention"
    T, M = x_TM.shape
    assert isinstance(M, int)
    H, G, D = spec.num_heads, spec.num_kv_heads, spec.head_dim
    parts = (H * D, G * D, G * D)
    bias = b.weight(f"{at}.qkv_bias", sum(parts), parts=parts) if spec.qkv_bias else None
    qkv_TX = b.linear(x_TM, b.weight(f"{at}.qkv", sum(parts), M, parts=parts), bias)
    kv_cache = b.cache(f"layers.{layer}.kv", G, D)
    q_THD = b.activation("rope_kv_write", T, H, D)
    b.call(
        "rope_kv_write",
        (q_THD, kv_cache),
        (qkv_TX, cos_sin_TR, places.slots_T, *_qk_norms(b, at, spec)),
        (("num_kv_heads", G), ("eps", spec.norm.eps)),
    )
    optional: tuple[Value, ...] = (b.weight(f"{at}.sinks", H),) if spec.sinks else ()
    if spec.window is None:
        selection = _emit_selection(b, layer, q_THD, kv_cache, spec=spec, places=places)
        optional = (*(optional or (NOTHING,)), *selection)
    out_THD = b.activation("attention", T, H, D)
    b.call(
        "attention",
        (out_THD,),
        (
            *(q_THD, kv_cache, places.block_tables_BX, places.query_starts, places.context_lens_B),
            *optional,
        ),
        (
            ("num_kv_heads", G),
            ("scale", spec.scale),
            ("window", spec.window or 0),
            ("softcap", spec.softcap or 0.0),
        ),
    )
    return b.view(out_THD, T, H * D)


def _emit_selection(
    b: Builder, layer: int, q_THD: Value, kv_cache: Value, *, spec: AttentionSpec, places: Places
) -> tuple[Value, Value]:
    """What each request attends to in a layer, and how many that is; and the layer's share of the kept mass."""
    S, G = b.block_tokens, spec.num_kv_heads
    B, X = places.block_tables_BX.shape
    shape = (B, G, X, S // unit_tokens(S))
    context = (places.block_tables_BX, places.query_starts, places.context_lens_B)
    rules = (places.sparse_budgets_B, places.sparse_dense_layers_B)
    at = (("layer", layer), ("block_tokens", S))
    meta = b.meta(f"layers.{layer}.meta", G, spec.head_dim)
    b.call("block_meta_update", (meta,), (kv_cache, places.meta_units_U), (("block_tokens", S),))
    scores = b.activation("block_score", *shape)
    scale = ("scale", spec.scale)
    b.call("block_score", (scores,), (q_THD, meta, *context, *rules), (*at, scale))
    selected = b.activation("block_topk", *shape, dtype=DType.INT32)
    num_selected = b.activation("block_topk", B, G, dtype=DType.INT32)
    ins = (scores, places.context_lens_B, *rules)
    b.call("block_topk", (selected, num_selected), ins, at)
    before = () if b.kept_mass is None else (b.kept_mass,)
    b.kept_mass = b.activation("kept_mass", B, 2)
    b.call(
        "kept_mass",
        (b.kept_mass,),
        (q_THD, kv_cache, *context, selected, num_selected, places.sparse_measured_B, *before),
        (("num_kv_heads", G), scale, ("softcap", spec.softcap or 0.0)),
    )
    return selected, num_selected


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
