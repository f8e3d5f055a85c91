"""How much attention each full unit of a sparse request may get, as `block_topk` ranks them.

s[h, j] = scale * sum over d of (q[d] * mean[d] + |q[d]| * std[d]), q the request's one row, mean and std of unit j: about the
largest score of its tokens. A KV head's units are shared by its query heads, so these are made comparable and the greatest
counts: score[g, j] = max over h of (s[h, j] - logsumexp over the full units of s[h]). fp32.

Of a sparse request, units that are not full (the last) and those past its end get -inf; other requests' rows are not written.
"""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_bf16, expect_dtype
from vivace.kernels.selection import unit_tokens


class Run(Protocol):
    """Every backend's `run`: outputs first."""

    def __call__(
        self,
        scores_BGXZ: Buffer,  # fp32, out; units of a request in order, Z of each of the X blocks of its table
        q_THD: Buffer,  # fp32
        meta: Buffer,  # bf16 [N * Z, G, 2, D], from block_meta_update; all full units of sparse requests are there
        block_tables_BX: Buffer,  # int32
        query_starts: Buffer,  # int32 [B + 1]
        context_lens_B: Buffer,  # int32, this step's rows included
        budgets_B: Buffer,  # int32, units; 0: dense
        dense_layers_B: Buffer,  # int32
        *,
        layer: int,
        scale: float,
        block_tokens: int,  # S
    ) -> None: ...


def check(
    scores_BGXZ: Buffer,
    q_THD: Buffer,
    meta: Buffer,
    block_tables_BX: Buffer,
    query_starts: Buffer,
    context_lens_B: Buffer,
    budgets_B: Buffer,
    dense_layers_B: Buffer,
    *,
    layer: int,
    scale: float,
    block_tokens: int,
) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    _, H, D = expect("q", q_THD, None, None, None)
    _, G, _, _ = expect("meta", meta, None, None, 2, D)
    B, X = expect("block_tables", block_tables_BX, None, None)
    expect("scores", scores_BGXZ, B, G, X, block_tokens // unit_tokens(block_tokens))
    expect("query_starts", query_starts, B + 1)
    for name, buffer in (
        ("context_lens", context_lens_B),
        ("budgets", budgets_B),
        ("dense_layers", dense_layers_B),
    ):
        expect(name, buffer, B)
        expect_dtype(name, buffer, "int32")
    expect_dtype("block_tables", block_tables_BX, "int32")
    expect_dtype("query_starts", query_starts, "int32")
    expect_dtype("scores", scores_BGXZ, "float32")
    expect_dtype("q", q_THD, "float32")
    expect_bf16("meta", meta)
    if G < 1 or H % G:
        raise ValueError(f"{G} KV heads of meta must divide {H} query heads")
    if layer < 0:
        raise ValueError(f"layer must be at least 0, got {layer}")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
