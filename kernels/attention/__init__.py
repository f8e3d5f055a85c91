"""Causal attention of a step's rows over the paged cache; decode rows and prefill chunks in one call, grouped heads.

Request b owns rows query_starts[b] .. query_starts[b+1] - 1, the last of its context_lens[b] tokens, all of which are
in the cache already; the row at position p attends to positions 0..p, or max(0, p - w + 1)..p with a window w > 0.
What lies left of the window of a request's first row is not read: neither its block numbers nor the cache.
Query head h reads KV head h // (H / G). Position p lies in block block_tables[b, p // S] at offset p % S.
A softcap c > 0 makes c * tanh(s / c) of a scaled score s. A sink is one more logit of a head, which joins the softmax
and has no value (GPT-OSS; arXiv:2309.17453). Softmax in fp32, added up over splits or tiles of a fixed size (on the CPU
SPLIT_TOKENS) counted from position 0, so a row's result depends on nothing but its own context. Rows past
query_starts[B] become 0.

With a selection (kernels.selection), the query heads of KV head g of request b attend to the first num_selected[b, g] units of
selected[b, g] alone, as if their tokens lay side by side: splits are counted from the first of these. -1 is all of the context.
Selecting every unit gives the bits of -1. There is no window then, and whoever has a selection has one row.
"""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype, expect_kv_cache

SPLIT_TOKENS = 256


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        out_THD: Buffer,  # fp32, out
        q_THD: Buffer,  # fp32
        kv_cache: Buffer,  # from Memory.kv_cache
        block_tables_BX: Buffer,  # int32; entries past a request's last block are not read
        query_starts: Buffer,  # int32 [B + 1], ascending from 0
        context_lens_B: Buffer,  # int32, this step's rows included
        sinks_H: Buffer | None = None,  # fp32
        selected_BGXZ: Buffer | None = None,  # int32, from block_topk
        num_selected_BG: Buffer | None = None,  # int32, with `selected`
        *,
        num_kv_heads: int,
        scale: float,
        window: int = 0,  # positions; 0: no window
        softcap: float = 0.0,  # 0: none
    ) -> None: ...


def check(
    out_THD: Buffer,
    q_THD: Buffer,
    kv_cache: Buffer,
    block_tables_BX: Buffer,
    query_starts: Buffer,
    context_lens_B: Buffer,
    sinks_H: Buffer | None = None,
    selected_BGXZ: Buffer | None = None,
    num_selected_BG: Buffer | None = None,
    *,
    num_kv_heads: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    _, H, D = expect("q", q_THD, None, None, None)
    expect("out", out_THD, *q_THD.shape)
    B, _ = expect("block_tables", block_tables_BX, None, None)
    expect("query_starts", query_starts, B + 1)
    expect("context_lens", context_lens_B, B)
    expect_kv_cache(kv_cache, num_kv_heads, D)
    if H % num_kv_heads:
        raise ValueError(f"num_kv_heads ({num_kv_heads}) must divide {H} query heads")
    for name, buffer in (
        ("block_tables", block_tables_BX),
        ("query_starts", query_starts),
        ("context_lens", context_lens_B),
    ):
        expect_dtype(name, buffer, "int32")
    expect_dtype("q", q_THD, "float32")
    expect_dtype("out", out_THD, "float32")
    if sinks_H is not None:
        expect("sinks", sinks_H, H)
        expect_dtype("sinks", sinks_H, "float32")
    check_selection(block_tables_BX, selected_BGXZ, num_selected_BG, num_kv_heads, window)
    if window < 0:
        raise ValueError(f"window must be at least 0, got {window}")
    if not softcap >= 0:
        raise ValueError(f"softcap must be at least 0, got {softcap}")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")


def check_selection(
    block_tables_BX: Buffer,
    selected_BGXZ: Buffer | None,
    num_selected_BG: Buffer | None,
    num_kv_heads: int,
    window: int,
) -> None:
    """Raise ValueError unless this is a selection from these tables, or none."""
    if (selected_BGXZ is None) != (num_selected_BG is None):
        raise ValueError("selected and num_selected are given together or not at all")
    if selected_BGXZ is None or num_selected_BG is None:
        return
    B, X = block_tables_BX.shape
    expect("selected", selected_BGXZ, B, num_kv_heads, X, None)
    expect("num_selected", num_selected_BG, B, num_kv_heads)
    expect_dtype("selected", selected_BGXZ, "int32")
    expect_dtype("num_selected", num_selected_BG, "int32")
    if window:
        raise ValueError(f"window must be 0 with a selection, got {window}")
