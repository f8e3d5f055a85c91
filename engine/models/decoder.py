"""A `ModelSpec` to a `Program`: the order of the blocks. Computes nothing and knows no tensor's
name in a checkpoint."""

from vivace.engine.models.attention import Places, emit_attention, emit_output
from vivace.engine.models.builder import Builder
from vivace.engine.models.mlp import emit_mlp
from vivace.engine.models.moe import emit_moe
from vivace.engine.models.norm import emit_add_rmsnorm, emit_rmsnorm
from vivace.engine.models.program import Program, Symbol, Value
from vivace.engine.models.rope import emit_rope_table
from vivace.engine.models.spec import LayerSpec, ModelSpec, MoeSpec, NormSpec, RopeSpec
from vivace.kernels.buffer import DType

T, B, B1, P, R = Symbol.T, Symbol.B, Symbol.B1, Symbol.P, Symbol.R
X, U = Symbol.X, Symbol.U


def emit(spec: ModelSpec, cache_dtype: DType = DType.FP32, block_tokens: int = 16) -> Program:
    """The program of one step: tokens of any requests in; out, the final hidden state [P, M] of the
    rows that are asked for, and logits [R, V] of the first of these.

    From the last layer's attention on only those rows are carried: nothing after it looks at other
    rows.
    """
    b = Builder(cache_dtype, block_tokens)
    places = Places(
        slots_T=b.input("slots", T),
        block_tables_BX=b.input("block_tables", B, X),
        query_starts=b.input("query_starts", B1),
        context_lens_B=b.input("context_lens", B),
        meta_units_U=b.input("meta_units", U),
        sparse_budgets_B=b.input("sparse_budgets", B),
        sparse_dense_layers_B=b.input("sparse_dense_layers", B),
        sparse_measured_B=b.input("sparse_measured", B),
    )
    rows_P = b.input("rows", P)
    tables = _rope_tables(b, spec)
    embed_VM = b.weight("embed", spec.vocab_size, spec.model_size)
    residual = b.activation("embed", T, spec.model_size)
    b.call("embed", (residual,), (b.input("tokens", T), embed_VM), (("scale", spec.embed_scale),))
    normed = residual
    if spec.layers[0].norms_before:
        normed = emit_rmsnorm(b, "layers.0.attention.norm", residual, norm=spec.norm)
    for i, layer in enumerate(spec.layers):
        at = f"layers.{i}"
        rope = tables[layer.attention.rope]
        heads = emit_attention(b, i, normed, layer.attention, cos_sin_TR=rope, places=places)
        is_last = i == len(spec.layers) - 1
        if is_last:
            heads, residual = b.take_rows(heads, rows_P), b.take_rows(residual, rows_P)
        attended = emit_output(
            b, at, heads, model_size=spec.model_size, has_bias=layer.attention.out_bias
        )
        attended = _after(b, f"{at}.attention", attended, layer=layer, norm=spec.norm)
        next_norm = f"{at}.mlp.norm" if layer.norms_before else None
        residual, normed = _add(b, next_norm, attended, residual_TM=residual, norm=spec.norm)
        mixed = _emit_block(b, at, normed, layer)
        mixed = _after(b, f"{at}.mlp", mixed, layer=layer, norm=spec.norm)
        next_norm = f"layers.{i + 1}.attention.norm" if layer.norms_before else None
        if is_last:
            next_norm = "final_norm"
        residual, normed = _add(b, next_norm, mixed, residual_TM=residual, norm=spec.norm)
    return b.finish(normed, _emit_logits(b, normed, embed_VM, spec))


def _emit_block(b: Builder, at: str, x_TM: Value, layer: LayerSpec) -> Value:
    if isinstance(layer.mlp, MoeSpec):
        return emit_moe(b, at, x_TM, layer.mlp)
    return emit_mlp(b, f"{at}.mlp", x_TM, layer.mlp)


def _after(b: Builder, at: str, x_TM: Value, *, layer: LayerSpec, norm: NormSpec) -> Value:
    """A block's result, normed if the layer norms those."""
    return emit_rmsnorm(b, f"{at}.after_norm", x_TM, norm=norm) if layer.norms_after else x_TM


def _add(
    b: Builder, next_norm: str | None, x_TM: Value, *, residual_TM: Value, norm: NormSpec
) -> tuple[Value, Value]:
    """The new residual, and what the next block reads: it or its norm."""
    if next_norm is not None:
        return emit_add_rmsnorm(b, next_norm, x_TM, residual_TM, norm=norm)
    sum_TM = b.activation("add", *x_TM.shape)
    b.call("add", (sum_TM,), (x_TM, residual_TM))
    return sum_TM, sum_TM


def _emit_logits(b: Builder, hidden_PM: Value, embed_VM: Value, spec: ModelSpec) -> Value:
    head_VM = embed_VM
    if not spec.tied_embeddings:
        head_VM = b.weight("lm_head", spec.vocab_size, spec.model_size)
    logits_RV = b.linear(b.view(hidden_PM, R, spec.model_size), head_VM)
    if spec.final_softcap is None:
        return logits_RV
    capped_RV = b.activation("softcap", *logits_RV.shape)
    b.call("softcap", (capped_RV,), (logits_RV,), (("cap", spec.final_softcap),))
    return capped_RV


def _rope_tables(b: Builder, spec: ModelSpec) -> dict[RopeSpec, Value]:
    """One table for each kind of rotation, shared by the layers that use it."""
    positions_T = b.input("positions", T)
    variants_T = None if spec.long_rope_from is None else b.input("rope_variants", T)
    ropes = dict.fromkeys(layer.attention.rope for layer in spec.layers)
    return {
        rope: emit_rope_table(b, f"rope.{i}", positions_T, variants_T=variants_T, spec=rope)
        for i, rope in enumerate(ropes)
    }
