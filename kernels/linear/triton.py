"""Projections on a GPU: one tiled product. Few rows: bound by the weight's bytes, read once; many: by flops.

x is rounded to the weight's type here, so a bf16 weight means a bf16 product with fp32 sums; an fp32 weight runs without
tensor cores and is slow. Each output is one chain of additions over ascending K, never split, whatever T is. On a GPU the
width of the tiles changes no bit of fp32 (multiply-adds one after the other); on tensor cores rows are equal bitwise within a
bucket of T, and across buckets where both use the same instruction, not where one is wide enough for Hopper's wgmma. The
interpreter's products are NumPy's, which adds up by the place in a tile: there, sums that are exact are equal.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vivace.kernels.gpu.launcher import Config, Launcher

DEFAULTS = {
    "T<=16": Config({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128}, num_stages=5),
    "T<=64": Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, num_stages=4),
    "T>64": Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3),
    "fp32, T<=16": Config({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32}, num_stages=3),
    "fp32, T>16": Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=8),
}
EXPECT = {
    "sm_80": {"_linear": ("16-byte loads",), "_linear *bf16:16": ("HMMA",)},
    "sm_90": {"_linear": ("16-byte loads",), "_linear *bf16:16 BLOCK_M=128": ("HGMMA",)},
}


@triton.jit
def cast(x, TYPE: tl.constexpr, UPCAST: tl.constexpr):
    """fp32 to the nearest of another float type, halves to even. UPCAST: the interpreter cuts off what bf16 has no bits for."""
    if UPCAST and tl.bfloat16 == TYPE:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(TYPE)


@triton.jit
def widen(x, UPCAST: tl.constexpr):
    """Any float type to fp32. UPCAST: the interpreter makes a bf16 of 0 the least normal number."""
    if UPCAST and tl.bfloat16 == x.dtype:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def _linear(
    out,  # fp32 [T, N]
    x,  # fp32 [T, K]
    weight,  # fp32 or bf16 [N, K]
    bias,  # fp32 [N]; not read without HAS_BIAS
    T,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is whole blocks
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_at = x + rows.to(tl.int64)[:, None] * K + k[None, :]
    w_at = weight + columns.to(tl.int64)[None, :] * K + k[:, None]
    is_row, is_column = rows[:, None] < T, columns[None, :] < N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(x_at + start, mask=is_row, other=0.0)
            b = tl.load(w_at + start, mask=is_column, other=0.0)
        else:
            a = tl.load(x_at + start, mask=is_row & (k[None, :] < K - start), other=0.0)
            b = tl.load(w_at + start, mask=is_column & (k[:, None] < K - start), other=0.0)
        a = cast(a, weight.dtype.element_ty, UPCAST)
        if UPCAST:
            a = widen(a, UPCAST)
            b = widen(b, UPCAST)
        total = tl.dot(a, b, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < N, other=0.0)[None, :]
    out_at = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(out_at, total, mask=is_row & is_column)


def bind(launcher: Launcher) -> Callable[..., None]:
    configs = {name: launcher.config("linear", name, one) for name, one in DEFAULTS.items()}

    def run(
        out_TN: torch.Tensor,
        x_TK: torch.Tensor,
        weight_NK: torch.Tensor,
        bias_N: torch.Tensor | None = None,
    ) -> None:
        """See `kernels.linear`."""
        (T, N), K = out_TN.shape, x_TK.shape[1]
        config = configs[_bucket(T, weight_NK.dtype)]
        grid = (triton.cdiv(T, config.tiles["BLOCK_M"]), triton.cdiv(N, config.tiles["BLOCK_N"]))
        args = (out_TN, x_TK, weight_NK, out_TN if bias_N is None else bias_N, T, N, K)
        constexprs = {
            "HAS_BIAS": bias_N is not None,
            "EVEN_K": K % config.tiles["BLOCK_K"] == 0,
            "UPCAST": launcher.upcast,
        }
        launcher.launch(_linear, grid, args, constexprs, config)

    return run


def _bucket(T: int, dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return "fp32, T<=16" if T <= 16 else "fp32, T>16"
    return "T<=16" if T <= 16 else "T<=64" if T <= 64 else "T>64"
