"""A tile of queries on its way over the keys and values of a paged cache: what kernels of attention have in common.

K and V are read where a table of blocks, or a selection of units, says; the running softmax counts in powers of two.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(
    -1.0e30
)  # below every score and finite: a row that sees nothing keeps a sum of 0


@triton.jit
def place(
    table_ptr, units_ptr, n, position, ok, g, G: tl.constexpr, S: tl.constexpr, U: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows of K, of D elements each, of the positions n .. n + BLOCK_N - 1; those of V are G * S further on.

    Of a selection, positions count in its units of U; U is 0 without one.
    """
    if U > 0:
        unit = tl.load(units_ptr + position // U, mask=ok, other=0)
        position = unit * U + position % U
        block = tl.load(table_ptr + position // S, mask=ok, other=0).to(tl.int64)
    elif S % BLOCK_N == 0:
        block = tl.load(table_ptr + n // S).to(tl.int64)
    else:
        block = tl.load(table_ptr + position // S, mask=ok, other=0).to(tl.int64)
    return (block * 2 * G + g) * S + position % S


@triton.jit
def load_heads(
    kv_ptr, row, ok, D: tl.constexpr, WIDTH: tl.constexpr, PAD_D: tl.constexpr, MASKED: tl.constexpr
):
    """[BLOCK_N, PAD_D] of the cache; 0 where not ok and past D."""
    d = tl.arange(0, PAD_D)
    at = kv_ptr + row[:, None] * WIDTH + d[None, :]
    if MASKED:
        return tl.load(at, mask=ok[:, None] & (d < D)[None, :], other=0)
    if PAD_D != D:
        return tl.load(at, mask=(d < D)[None, :], other=0)
    return tl.load(at)


@triton.jit
def load_scales(kv_ptr, row, ok, D: tl.constexpr, WIDTH: tl.constexpr):
    """[BLOCK_N] fp32, from the bytes behind the heads."""
    at = (kv_ptr + row * WIDTH + D).to(tl.pointer_type(tl.float32))
    return tl.load(at, mask=ok, other=0.0)


@triton.jit
def load_queries(
    q_ptr, at, real, D: tl.constexpr, PAD_D: tl.constexpr, BF16: tl.constexpr, UPCAST: tl.constexpr
):
    """[BLOCK_M, PAD_D] as the products take them; 0 where not real and past D."""
    d = tl.arange(0, PAD_D)
    q = tl.load(
        q_ptr + at[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0
    )
    return rounded(q, BF16, UPCAST)


@triton.jit
def reloaded(q, out_ptr, at, real, D: tl.constexpr, PAD_D: tl.constexpr, UPCAST: tl.constexpr):
    """The same queries by way of memory, where the result will be: Hopper multiplies what was loaded from shared memory."""
    d = tl.arange(0, PAD_D)
    kept = out_ptr.to(tl.pointer_type(tl.bfloat16)) + at[:, None] * (2 * D) + d[None, :]
    ok = real[:, None] & (d < D)[None, :]
    tl.store(kept, q.to(tl.bfloat16), mask=ok)
    tl.debug_barrier()
    return rounded(tl.load(kept, mask=ok, other=0.0), True, UPCAST)


@triton.jit
def rounded(x, BF16: tl.constexpr, UPCAST: tl.constexpr):
    """fp32 in the type of the products. UPCAST: the interpreter's bf16 products are wrong."""
    if BF16:
        x = x.to(tl.bfloat16)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def tanh(x):
    """By an exponential that cannot overflow."""
    t = tl.math.exp2(tl.abs(x) * (-2.0 * LOG2E))
    t = (1.0 - t) / (1.0 + t)
    return tl.where(x < 0, -t, t)


@triton.jit
def attend(
    acc, m, norm, q, k, v, k_scale, v_scale, visible, inner, outer,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, INT8: tl.constexpr, BF16: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of K and V into the running sums; scores count in powers of two."""
    s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
    if INT8:
        s *= k_scale[None, :]
    if SOFTCAP:
        s = tanh(s * inner)
    if MASKED:
        s = tl.where(visible, s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * outer)
    p = tl.math.exp2(s * outer - m_new[:, None])
    alpha = tl.math.exp2(m - m_new)
    norm = norm * alpha + tl.sum(p, 1)
    if INT8:
        p *= v_scale[None, :]
    acc = tl.dot(
        rounded(p, BF16, UPCAST), v.to(q.dtype), acc * alpha[:, None], input_precision="ieee"
    )
    return acc, m_new, norm


@triton.jit
def with_sink(m, norm, sinks_ptr, head):
    """The sum of the weights with one more logit, and what the others shrink to."""
    sink = tl.load(sinks_ptr + head) * LOG2E
    m_new = tl.maximum(m, sink)
    rest = tl.math.exp2(m - m_new)
    return norm * rest + tl.math.exp2(sink - m_new), rest


@triton.jit
def sweep(
    acc, m, norm, q, kv, table_ptr, units_ptr, g, lo, hi, first, end, last, window, inner, outer,
    G: tl.constexpr, S: tl.constexpr, U: tl.constexpr, D: tl.constexpr, PAD_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, IN_CHUNK: tl.constexpr, TMA: tl.constexpr, SOFTCAP: tl.constexpr, INT8: tl.constexpr,
    BF16: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The tiles of positions from lo, a multiple of BLOCK_N, to hi; of them, if MASKED, only first .. end - 1 are read."""
    WIDTH: tl.constexpr = D + 4 * INT8
    # A chunk's edges are a tile or two. What is hoisted out of three loops has no room in registers.
    STAGES: tl.constexpr = 1 if MASKED and IN_CHUNK else None
    for n in tl.range(lo, hi, BLOCK_N, num_stages=STAGES, disable_licm=IN_CHUNK and BF16):
        position = n + tl.arange(0, BLOCK_N)
        ok = (position >= first) & (position < end)
        ago = last[:, None] - position[None, :]
        visible = ok[None, :] & (ago >= 0) & (ago < window)
        k_scale, v_scale = 1.0, 1.0
        if TMA:
            row = place(table_ptr, units_ptr, n, n, True, g, G, S, U, BLOCK_N).to(tl.int32)
            k = kv.load([row, 0])
            v = kv.load([row + G * S, 0])
            if MASKED:  # what nobody wrote may be NaN, and 0 * NaN is NaN
                v = tl.where(ok[:, None], v, 0.0)
        else:
            row = place(table_ptr, units_ptr, n, position, ok, g, G, S, U, BLOCK_N)
            k = load_heads(kv, row, ok, D, WIDTH, PAD_D, MASKED)
            v = load_heads(kv, row + G * S, ok, D, WIDTH, PAD_D, MASKED)
            if INT8:
                k_scale = load_scales(kv, row, ok, D, WIDTH)
                v_scale = load_scales(kv, row + G * S, ok, D, WIDTH)
        acc, m, norm = attend(
            acc, m, norm, q, k, v, k_scale, v_scale, visible, inner, outer, MASKED, SOFTCAP, INT8, BF16, UPCAST
        )  # fmt: skip
    return acc, m, norm
