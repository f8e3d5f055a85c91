"""A `ModelSpec` to a `Program`: the order of the blocks. Computes nothing and knows no tensor's
name in a checkpoint."""

from vivace.engine.models.attention import Places, emit_attention, emit_output
from vivace.engine.models.builder import Builder
from vivace.engine.models.mlp import emit_mlp
from vivace.engine.models.norm import emit_add_rmsnorm, emit_rmsnorm
from vivace.engine.models.program import Program, Symbol, Value
from vivace.engine.models.rope import emit_rope_table
from vivace.engine.models.spec import ModelSpec, RopeSpec

T, B, B1, R, X = Symbol.T, Symbol.B, Symbol.B1, Symbol.R, Symbol.X


def emit(spec: ModelSpec) -> Program:
    """The program of one step: tokens of any requests in, logits [R, V] of the rows that need them
    out.

    From the last layer's attention on only those rows are carried: nothing after it looks at other
    rows.
    """
    b = Builder()
    places = Places(
        slots_T=b.input("slots", T),
        block_tables_BX=b.input("block_tables", B, X),
        query_starts=b.input("query_starts", B1),
        context_lens_B=b.input("context_lens", B),
    )
    rows_R = b.input("rows", R)
    tables = _rope_tables(b, spec)
    embed_VM = b.weight("embed", spec.vocab_size, spec.model_size)
    residual = b.activation("embed", T, spec.model_size)
    b.call("embed", (residual,), (b.input("tokens", T), embed_VM))
    eps = spec.norm_eps
    normed = emit_rmsnorm(b, "layers.0.attention.norm", residual, eps)
    for i, layer in enumerate(spec.layers):
        at = f"layers.{i}"
        heads = emit_attention(
            b,
            at,
            normed,
            layer.attention,
            cos_sin_TR=tables[layer.attention.rope],
            places=places,
        )
        is_last = i == len(spec.layers) - 1
        if is_last:
            heads, residual = b.take_rows(heads, rows_R), b.take_rows(residual, rows_R)
        attended = emit_output(b, at, heads, spec.model_size)
        residual, normed = emit_add_rmsnorm(b, f"{at}.mlp.norm", attended, residual, eps=eps)
        mixed = emit_mlp(b, f"{at}.mlp", normed, layer.mlp)
        next_norm = "final_norm" if is_last else f"layers.{i + 1}.attention.norm"
        residual, normed = emit_add_rmsnorm(b, next_norm, mixed, residual, eps=eps)
    head_VM = embed_VM
    if not spec.tied_embeddings:
        head_VM = b.weight("lm_head", spec.vocab_size, spec.model_size)
    return b.finish(b.linear(normed, head_VM))


def _rope_tables(b: Builder, spec: ModelSpec) -> dict[RopeSpec, Value]:
    """One table for each kind of rotation, shared by the layers that use it."""
    positions_T = b.input("positions", T)
    ropes = dict.fromkeys(layer.attention.rope for layer in spec.layers)
    return {
        rope: emit_rope_table(b, f"rope.{i}", positions_T, rope) for i, rope in enumerate(ropes)
    }
