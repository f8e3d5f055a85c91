"""Attention over the paged cache in Triton: short requests in splits of their context, chunks of prompts in tiles.

The query heads of a KV head are the rows of one tile, so a block of K and V is loaded once for all of them. Which request
goes where is decided on the device from query_starts; grids depend on shapes alone. A row's result depends on nothing but
its own context and on which of the two kernels has it: splits and tiles are counted from position 0.
A request in attn_decode has at most SHORT rows, so heads and rows fit one tile of 16 (of more heads: their power of two).
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from vivace.kernels.attention import tiles
from vivace.kernels.buffer import SCALE_BYTES
from vivace.kernels.gpu.launcher import Config, Launcher
from vivace.kernels.gpu.sweep import LOG2E, LOWEST, load_queries, reloaded, sweep, with_sink
from vivace.kernels.selection import unit_tokens

CANDIDATES, EXPECT = tiles.CANDIDATES, tiles.EXPECT
MAX_HEAD_DIM = 256  # what registers and shared memory have room for
NO_WINDOW = 2**30


@triton.jit
def extent(lens_ptr, counts_ptr, units_ptr, b, g, X, G, S: tl.constexpr, U: tl.constexpr):
    """Positions that a request attends to for one KV head, in how many units of a selection (-1: all), and which those are."""
    end = tl.load(lens_ptr + b)
    count = -1
    if U > 0:
        at = b.to(tl.int64) * G + g
        count = tl.load(counts_ptr + at)
        units_ptr += at * X * (S // U)
        if count >= 0:  # the last unit, and it alone, may be in part
            last = tl.load(units_ptr + count - 1)
            end = (count - 1) * U + tl.minimum(end - last * U, U)
    return end, count, units_ptr


@triton.jit(do_not_specialize=["T", "B", "X", "splits", "slots", "window"])
def attn_decode(
    sums_ptr,  # fp32 [slots, H, splits, D], out
    stats_ptr,  # fp32 [slots, H, splits, 2], out: the largest score and the sum of the weights
    q_ptr,  # fp32 [T, H, D]
    kv_ptr,  # [N, 2, G, S, D], int8 with 4 bytes more
    tables_ptr,  # int32 [B, X]
    starts_ptr,  # int32 [B + 1]
    lens_ptr,  # int32 [B]
    counts_ptr,  # int32 [B, G], if U
    units_ptr,  # int32 [B, G, X * S / U], if U
    X,
    splits,
    slots,  # T, or SHORT for each request
    T,
    window,
    inner,  # of a score before the softcap
    outer,  # and after it, base 2
    H: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    U: tl.constexpr,  # tokens of a unit of the selection; 0: there is none
    IS_SPARSE: tl.constexpr,  # whose turn it is, if U: requests that have a selection, or the others
    D: tl.constexpr,
    PAD_D: tl.constexpr,
    SHORT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    INT8: tl.constexpr,
    BF16: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One split of a short request's context for one KV head. Bound by the bytes of K and V."""
    split, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(starts_ptr + b)
    num_rows = tl.load(starts_ptr + b + 1) - start
    end, count, units_ptr = extent(lens_ptr, counts_ptr, units_ptr, b, g, X, G, S, U)
    first = tl.maximum(end - num_rows - window + 1, 0)
    lo = tl.maximum(split * SPLIT, first // BLOCK_N * BLOCK_N)
    hi = tl.minimum((split + 1) * SPLIT, end)
    if (num_rows == 0) | (num_rows > SHORT) | (lo >= hi) | ((count >= 0) != IS_SPARSE):
        return
    GROUP: tl.constexpr = H // G
    i = tl.arange(0, BLOCK_M)
    row, head = i // GROUP, g * GROUP + i % GROUP
    real = row < num_rows
    at = (start + row).to(tl.int64) * H + head
    q = load_queries(q_ptr, at, real, D, PAD_D, BF16, UPCAST)
    acc = tl.zeros([BLOCK_M, PAD_D], tl.float32)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    table_ptr = tables_ptr + b.to(tl.int64) * X
    acc, m, norm = sweep(
        acc, m, norm, q, kv_ptr, table_ptr, units_ptr, g, lo, hi, first, hi, end - num_rows + row, window,
        inner, outer, G, S, U * IS_SPARSE, D, PAD_D, BLOCK_N, True, False, False, SOFTCAP, INT8, BF16, UPCAST,
    )  # fmt: skip
    slot = tl.where(slots == T, start, b * SHORT) + row
    at = (slot.to(tl.int64) * H + head) * splits + split
    tl.store(stats_ptr + at * 2, m, mask=real)
    tl.store(stats_ptr + at * 2 + 1, norm, mask=real)
    d = tl.arange(0, PAD_D)
    tl.store(sums_ptr + at[:, None] * D + d[None, :], acc, mask=real[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["T", "B", "X", "H", "G", "SHORT", "splits", "slots", "window"])
def attn_combine(
    out_ptr,  # fp32 [T, H, D], out: rows of short requests, and of nobody
    sums_ptr,  # fp32 [slots, H, splits, D]
    stats_ptr,  # fp32 [slots, H, splits, 2]
    starts_ptr,  # int32 [B + 1]
    lens_ptr,  # int32 [B]
    counts_ptr,  # int32 [B, G], if U
    units_ptr,  # int32 [B, G, X * S / U], if U
    sinks_ptr,  # fp32 [H], if HAS_SINKS
    B,
    X,
    splits,
    slots,
    T,
    window,
    H,
    G,
    SHORT,
    S: tl.constexpr,
    U: tl.constexpr,
    D: tl.constexpr,
    PAD_D: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """The splits of one request and head, in their order; program B makes the rows of nobody 0. Bound by launch and latency."""
    head, b = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, PAD_D)
    i = tl.arange(0, CHUNK)
    start = tl.load(starts_ptr + b)
    if b == B:
        for t in range(start, T, CHUNK):
            at = ((t + i).to(tl.int64) * H + head)[:, None] * D + d[None, :]
            nothing = tl.zeros([CHUNK, PAD_D], tl.float32)
            tl.store(out_ptr + at, nothing, mask=(t + i < T)[:, None] & (d < D)[None, :])
        return
    num_rows = tl.load(starts_ptr + b + 1) - start
    if num_rows > SHORT:
        return
    end, _, _ = extent(lens_ptr, counts_ptr, units_ptr, b, head // (H // G), X, G, S, U)
    first = tl.maximum(end - num_rows - window + 1, 0) // SPLIT
    for row in range(num_rows):
        slot = tl.where(slots == T, start, b * SHORT) + row
        acc = tl.zeros([PAD_D], tl.float32)
        m, norm = tl.full([], LOWEST, tl.float32), tl.full([], 0.0, tl.float32)
        for n in tl.range(first // CHUNK * CHUNK, tl.cdiv(end, SPLIT), CHUNK):
            ok = (n + i >= first) & (n + i < tl.cdiv(end, SPLIT))
            at = (slot.to(tl.int64) * H + head) * splits + n + i
            m_n = tl.load(stats_ptr + at * 2, mask=ok, other=LOWEST)
            l_n = tl.load(stats_ptr + at * 2 + 1, mask=ok, other=0.0)
            acc_n = tl.load(
                sums_ptr + at[:, None] * D + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0
            )  # fmt: skip
            m_new = tl.maximum(m, tl.max(m_n, 0))
            alpha, weight = tl.math.exp2(m - m_new), tl.math.exp2(m_n - m_new)
            norm = norm * alpha + tl.sum(l_n * weight, 0)
            acc = acc * alpha + tl.sum(acc_n * weight[:, None], 0)
            m = m_new
        if HAS_SINKS:
            norm, rest = with_sink(m, norm, sinks_ptr, head)
            acc *= rest
        at = (start + row).to(tl.int64) * H + head
        tl.store(out_ptr + at * D + d, acc / tl.where(norm == 0, 1.0, norm), mask=d < D)


@triton.jit
def request_of(tile, starts_ptr, B, SHORT: tl.constexpr, BLOCK_Q: tl.constexpr):
    """The request that a tile belongs to, B if to none, and which of its tiles it is."""
    b, begin, total = 0, 0, 0
    for base in range(0, B, 128):
        i = base + tl.arange(0, 128)
        num_rows = tl.load(starts_ptr + i + 1, mask=i < B, other=0)
        num_rows -= tl.load(starts_ptr + i, mask=i < B, other=0)
        tiles = tl.where(num_rows > SHORT, tl.cdiv(num_rows, BLOCK_Q), 0)
        passed = (total + tl.cumsum(tiles, 0) <= tile) & (i < B)
        b += tl.sum(passed.to(tl.int32), 0)
        begin += tl.sum(tl.where(passed, tiles, 0), 0)
        total += tl.sum(tiles, 0)
    return b, tile - begin


@triton.jit(do_not_specialize=["B", "X", "window"])
def attn_prefill(
    out_ptr,  # fp32 [T, H, D], out: rows of the other requests
    q_ptr,  # fp32 [T, H, D]
    kv,  # [N, 2, G, S, D], int8 with 4 bytes more; TMA: a descriptor of its [N * 2 * G * S, D]
    tables_ptr,  # int32 [B, X]
    starts_ptr,  # int32 [B + 1]
    lens_ptr,  # int32 [B]
    sinks_ptr,  # fp32 [H], if HAS_SINKS
    B,
    X,
    window,
    inner,  # of a score before the softcap
    outer,  # and after it, base 2
    H: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    PAD_D: tl.constexpr,
    SHORT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    SHARED_Q: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    INT8: tl.constexpr,
    BF16: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of a chunk's rows for one KV head, the tiles with the most to do first. Bound by the two products."""
    GROUP: tl.constexpr = H // G
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    g = tl.program_id(0)
    b, tile = request_of(tl.num_programs(1) - 1 - tl.program_id(1), starts_ptr, B, SHORT, BLOCK_Q)
    if b == B:
        return
    start = tl.load(starts_ptr + b)
    num_rows = tl.load(starts_ptr + b + 1) - start
    low = tl.load(lens_ptr + b) - num_rows + tile * BLOCK_Q  # position of the tile's first row
    num_rows = tl.minimum(num_rows - tile * BLOCK_Q, BLOCK_Q)
    end = low + num_rows
    i = tl.arange(0, BLOCK_M)
    row, head = i // GROUP, g * GROUP + i % GROUP
    real = row < num_rows
    at = (start + tile * BLOCK_Q + row).to(tl.int64) * H + head
    q = load_queries(q_ptr, at, real, D, PAD_D, BF16, UPCAST)
    if SHARED_Q:
        q = reloaded(q, out_ptr, at, real, D, PAD_D, UPCAST)
    acc = tl.zeros([BLOCK_M, PAD_D], tl.float32)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    table_ptr = tables_ptr + b.to(tl.int64) * X
    first = tl.maximum(low - window + 1, 0)
    whole = tl.cdiv(tl.maximum(end - window, 0), BLOCK_N) * BLOCK_N  # every row sees all from here
    edge = (low + 1) // BLOCK_N * BLOCK_N  # to here
    for part in tl.static_range(3):
        if part == 0:
            lo, hi = first // BLOCK_N * BLOCK_N, tl.minimum(whole, end)
        elif part == 1:
            lo, hi = whole, edge
        else:
            lo, hi = tl.maximum(whole, edge), end
        acc, m, norm = sweep(
            acc, m, norm, q, kv, table_ptr, table_ptr, g, lo, hi, first, end, low + row, window, inner, outer,
            G, S, 0, D, PAD_D, BLOCK_N, part != 1, True, TMA, SOFTCAP, INT8, BF16, UPCAST,
        )  # fmt: skip
    if HAS_SINKS:
        norm, rest = with_sink(m, norm, sinks_ptr, head)
        acc *= rest[:, None]
    # Loaded anew: addresses that lived through the loops would not fit the registers.
    at = (tl.load(starts_ptr + b, volatile=True) + tile * BLOCK_Q + row).to(tl.int64) * H + head
    d = tl.arange(0, PAD_D)
    acc /= tl.where(norm == 0, 1.0, norm)[:, None]
    tl.store(out_ptr + at[:, None] * D + d[None, :], acc, mask=real[:, None] & (d < D)[None, :])


def _check_heads(D: int, is_int8: bool) -> None:
    if D > MAX_HEAD_DIM:
        raise ValueError(f"head size must be at most {MAX_HEAD_DIM}, got {D}")
    if is_int8 and D % SCALE_BYTES:
        raise ValueError(f"head size of an int8 cache must be a multiple of 4, got {D}")


def bind(launcher: Launcher) -> Callable[..., None]:
    """The op on one device."""

    def run(
        out_THD: torch.Tensor,
        q_THD: torch.Tensor,
        kv_cache: torch.Tensor,
        block_tables_BX: torch.Tensor,
        query_starts: torch.Tensor,
        context_lens_B: torch.Tensor,
        sinks_H: torch.Tensor | None = None,
        selected_BGXZ: torch.Tensor | None = None,
        num_selected_BG: torch.Tensor | None = None,
        *,
        num_kv_heads: int,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> None:
        (T, H, D), (B, X) = q_THD.shape, block_tables_BX.shape
        S, dtype = kv_cache.shape[3], str(kv_cache.dtype).removeprefix("torch.")
        is_fp32, is_int8 = dtype == "float32", dtype == "int8"
        _check_heads(D, is_int8)
        if T == 0:
            return
        pad_d, group = max(16, triton.next_power_of_2(D)), H // num_kv_heads
        is_plain = group & (group - 1) == 0 and not softcap and not is_int8
        shapes = f"{dtype}-d{pad_d}"  # that want the same tiles
        block_m = max(16, triton.next_power_of_2(group))
        short = block_m // group
        widths = {"S": S, "D": D, "PAD_D": pad_d}
        cache = widths | {"H": H, "G": num_kv_heads, "SHORT": short, "SOFTCAP": softcap > 0}
        cache |= {"INT8": is_int8, "BF16": not is_fp32, "UPCAST": launcher.upcast}
        inner, outer = scale / softcap if softcap else 1.0, float(LOG2E.value) * (softcap or scale)
        scaling = (window or NO_WINDOW, inner, outer)
        requests = (query_starts, context_lens_B)

        config = launcher.config("attn_decode", shapes, tiles.decode(is_fp32, D))
        splits, slots = triton.cdiv(X * S, config.tiles["SPLIT"]), min(T, B * short)
        sums = launcher.scratch("attention sums", (slots, H, splits, D), torch.float32)
        stats = launcher.scratch("attention stats", (slots, H, splits, 2), torch.float32)
        has_selection = selected_BGXZ is not None
        unit = unit_tokens(S) if has_selection else 0
        # without one, pointers that nobody follows
        selection = (num_selected_BG, selected_BGXZ) if has_selection else requests
        inputs = (q_THD, kv_cache, block_tables_BX, *requests, *selection)
        for is_sparse in (False, True) if has_selection else (False,):
            launcher.launch(
                attn_decode,
                (splits, num_kv_heads, B),
                (sums, stats, *inputs, X, splits, slots, T, *scaling),
                cache | {"U": unit, "IS_SPARSE": is_sparse, "BLOCK_M": block_m},
                tiles.of_selection(config) if is_sparse else config,
            )
        has_sinks = {"HAS_SINKS": sinks_H is not None}
        sinks = q_THD if sinks_H is None else sinks_H  # a pointer that nobody follows
        sizes = (B, X, splits, slots, T, scaling[0], H, num_kv_heads, short)
        launcher.launch(
            attn_combine,
            (H, B + 1),
            (out_THD, sums, stats, *requests, *selection, sinks, *sizes),
            has_sinks | widths | {"U": unit, "SPLIT": config.tiles["SPLIT"], "CHUNK": 16},
            Config(),
        )

        default = tiles.prefill(is_fp32, D, launcher.has_tma, is_plain)
        config = launcher.config("attn_prefill", shapes, default)
        block_n, rows = config.tiles["BLOCK_N"], max(config.tiles["BLOCK_M"], block_m)
        num_tiles = T // (rows // group) + min(B, T // (short + 1))
        is_boxed = launcher.has_tma and tiles.fit_boxes(kv_cache.element_size(), S, D, block_n)
        kv: torch.Tensor | TensorDescriptor = kv_cache
        if is_boxed:
            kv = TensorDescriptor.from_tensor(kv_cache.view(-1, D), [block_n, pad_d])
        launcher.launch(
            attn_prefill,
            (num_kv_heads, num_tiles if short < T else 0),
            (out_THD, q_THD, kv, block_tables_BX, *requests, sinks, B, X, *scaling),
            cache | has_sinks | {"TMA": is_boxed, "SHARED_Q": launcher.has_tma and not is_fp32},
            Config({"BLOCK_M": rows, "BLOCK_N": block_n}, config.num_warps, config.num_stages),
        )

    return run
