"""Kernels to compile: one that is as it should be on every target, and one that takes more registers than there are."""

import triton
import triton.language as tl

EXPECT = {
    "sm_80": {"matmul": ("HMMA", "16-byte loads")},
    "sm_90": {"matmul": ("HGMMA", "16-byte loads")},
}


@triton.jit(do_not_specialize=["M"])
def matmul(
    out_MN,  # [M, N] fp32
    x_MK,  # [M, K] bf16
    w_NK,  # [N, K] bf16
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_MK + m[:, None] * K + start + k, mask=m[:, None] < M, other=0.0)
        w = tl.load(w_NK + n[None, :] * K + start + k[:, None])
        sums = tl.dot(x, w, sums)
    tl.store(out_MN + m[:, None] * N + n, sums, mask=m[:, None] < M)


@triton.jit
def double(
    out_N,  # [N] fp32
    x_N,  # [N] fp32
    N,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_N + n, 2 * tl.load(x_N + n, mask=n < N, other=0.0), mask=n < N)
