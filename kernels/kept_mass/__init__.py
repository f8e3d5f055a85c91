"""How much of dense attention the selection keeps, of the requests that are to be measured: the recall guard's gauge.

mass[b] = before[b] + (kept, 1) for each request that is measured and sparse (its num_selected is not -1), else before[b], which
is 0 if not given. kept = mean over the query heads of sum over the selected positions of exp(s) / sum over all of exp(s), s the
scaled and soft-capped scores of the request's one row over its context; a learned sink counts in neither. fp32.

Reads all of K for those it measures: as dear as half of dense attention, so few rows are.
"""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype, expect_kv_cache


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        mass_B2: Buffer,  # fp32, out
        q_THD: Buffer,  # fp32
        kv_cache: Buffer,  # from Memory.kv_cache
        block_tables_BX: Buffer,  # int32
        query_starts: Buffer,  # int32 [B + 1]
        context_lens_B: Buffer,  # int32
        selected_BGXZ: Buffer,  # int32, from block_topk
        num_selected_BG: Buffer,  # int32
        measured_B: Buffer,  # int32, 0 or 1
        before_B2: Buffer | None = None,  # fp32
        *,
        num_kv_heads: int,
        scale: float,
        softcap: float = 0.0,  # 0: none
    ) -> None: ...


def check(
    mass_B2: Buffer,
    q_THD: Buffer,
    kv_cache: Buffer,
    block_tables_BX: Buffer,
    query_starts: Buffer,
    context_lens_B: Buffer,
    selected_BGXZ: Buffer,
    num_selected_BG: Buffer,
    measured_B: Buffer,
    before_B2: Buffer | None = None,
    *,
    num_kv_heads: int,
    scale: float,
    softcap: float = 0.0,
) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    _, H, D = expect("q", q_THD, None, None, None)
    B, X = expect("block_tables", block_tables_BX, None, None)
    expect_kv_cache(kv_cache, num_kv_heads, D)
    if H % num_kv_heads:
        raise ValueError(f"num_kv_heads ({num_kv_heads}) must divide {H} query heads")
    expect("mass", mass_B2, B, 2)
    expect("query_starts", query_starts, B + 1)
    expect("selected", selected_BGXZ, B, num_kv_heads, X, None)
    expect("num_selected", num_selected_BG, B, num_kv_heads)
    for name, buffer in (("context_lens", context_lens_B), ("measured", measured_B)):
        expect(name, buffer, B)
    for name, buffer in (
        ("block_tables", block_tables_BX),
        ("query_starts", query_starts),
        ("context_lens", context_lens_B),
        ("selected", selected_BGXZ),
        ("num_selected", num_selected_BG),
        ("measured", measured_B),
    ):
        expect_dtype(name, buffer, "int32")
    expect_dtype("mass", mass_B2, "float32")
    expect_dtype("q", q_THD, "float32")
    if before_B2 is not None:
        expect("before", before_B2, B, 2)
        expect_dtype("before", before_B2, "float32")
    if not softcap >= 0:
        raise ValueError(f"softcap must be at least 0, got {softcap}")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
