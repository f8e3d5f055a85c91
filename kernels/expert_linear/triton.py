"""Products by many experts in Triton. Bound by the bytes of the chosen experts' matrices, from some 100 rows each by flops.

A program makes BLOCK_N outputs of one tile of slots (`moe_assign`); x is rounded to the weight's type. Every element is one
chain of products from k = 0 up, whatever else is in the tile. Neighbouring programs share a tile: a tile's rows and, for some
tiles in turn, an expert's matrix are read from L2. Limits: a matrix has fewer than 2**31 elements. On a GPU, tiles of 16 and
of 64 rows run on different instructions, whose sums may round differently within a step of k.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vivace.kernels.gpu.launcher import Config, Launcher
from vivace.kernels.linear.triton import cast, widen
from vivace.kernels.moe_assign import max_tiles, tile_rows

MIN_ROWS = 16  # of tl.dot
CONFIGS = {  # by rows of a tile
    1: Config({"BLOCK_N": 32, "BLOCK_K": 128}, num_warps=4, num_stages=4),
    16: Config({"BLOCK_N": 64, "BLOCK_K": 128}, num_warps=4, num_stages=4),
    64: Config({"BLOCK_N": 128, "BLOCK_K": 64}, num_warps=4, num_stages=4),
    128: Config({"BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3),
}
CANDIDATES = {
    bucket: tuple(
        Config({"BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for n, k, warps, stages in found
    )
    for bucket, found in {
        "m1": [(16, 128, 4, 5), (16, 256, 4, 3), (32, 256, 4, 3), (64, 128, 4, 4), (64, 64, 4, 5)],
        "m16": [
            (32, 128, 4, 4),
            (64, 64, 4, 6),
            (64, 256, 4, 3),
            (128, 64, 4, 4),
            (128, 128, 8, 3),
        ],
        "m64": [(64, 64, 4, 4), (128, 64, 8, 4), (256, 64, 8, 3), (128, 128, 8, 2)],
        "m128": [(128, 64, 8, 4), (256, 64, 8, 2), (256, 64, 8, 3), (64, 64, 4, 4)],
    }.items()
}
EXPECT = {
    "sm_80": {"_expert_linear": ("16-byte loads",), "_expert_linear *bf16:16": ("HMMA",)},
    "sm_90": {
        "_expert_linear": ("16-byte loads",),
        "_expert_linear *bf16:16 BLOCK_M=16": ("HMMA",),
        "_expert_linear *bf16:16 BLOCK_M=64": ("HGMMA",),
        "_expert_linear *bf16:16 BLOCK_M=128": ("HGMMA",),
    },
}


@triton.jit
def tile_of(
    j,
    experts_ptr,  # int32 [slots]
    tiles_ptr,  # int32 [slots, 3]
    IS_ASSIGNED: tl.constexpr,
):
    """Expert, begin and end of tile j."""
    if IS_ASSIGNED:
        expert = tl.load(tiles_ptr + 3 * j)
        begin = tl.load(tiles_ptr + 3 * j + 1)
        end = tl.load(tiles_ptr + 3 * j + 2)
    else:
        expert = tl.load(experts_ptr + j)
        begin = j
        end = j + 1
    return expert, begin, end


@triton.jit
def slots_of(
    begin,
    end,
    order_ptr,  # int32 [slots]
    IS_ASSIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The slots of a tile, in int64, and which of them there are."""
    place = begin + tl.arange(0, BLOCK_M)
    is_row = place < end
    slot = tl.load(order_ptr + place, mask=is_row, other=0) if IS_ASSIGNED else place
    return slot.to(tl.int64), is_row


@triton.jit
def product(x, w_ptrs, acc, is_w, UPCAST: tl.constexpr):
    """acc + x w of one step of k; x is rounded to the weight's type."""
    w = tl.load(w_ptrs, mask=is_w, other=0)
    x = cast(x, w.dtype, UPCAST)
    if UPCAST:
        x, w = widen(x, UPCAST), widen(w, UPCAST)
    return tl.dot(x, w, acc, input_precision="ieee")


@triton.jit
def _expert_linear(
    out_ptr,  # fp32 [T, K, N], out
    x_ptr,  # fp32 [T, I], or [T, K, I] where SHARED is 1
    experts_ptr,  # int32 [T, K]
    order_ptr,  # int32 [T, K]
    tiles_ptr,  # int32 [T, K, 3]
    weight_ptr,  # fp32, bf16 or fp16 [E, N, I]
    bias_ptr,  # fp32 [E, N]
    N: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    SHARED: tl.constexpr,  # slots that read a row of x: K or 1
    HAS_BIAS: tl.constexpr,
    IS_ASSIGNED: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    NUM_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    expert, begin, end = tile_of(tl.program_id(0) // NUM_N, experts_ptr, tiles_ptr, IS_ASSIGNED)
    if expert < 0:
        return
    slot, is_row = slots_of(begin, end, order_ptr, IS_ASSIGNED, BLOCK_M)
    n = tl.program_id(0) % NUM_N * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (slot // SHARED * I)[:, None] + k[None, :]
    w_ptrs = weight_ptr + expert.to(tl.int64) * (N * I) + (n * I)[None, :] + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, I, BLOCK_K):
        is_k = start + k < I
        x = tl.load(x_ptrs + start, mask=is_row[:, None] & is_k[None, :], other=0)
        acc = product(x, w_ptrs + start, acc, (n < N)[None, :] & is_k[:, None], UPCAST)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + expert.to(tl.int64) * N + n, mask=n < N, other=0)[None, :]
    out_ptrs = out_ptr + (slot * N)[:, None] + n[None, :]
    tl.store(out_ptrs, acc, mask=is_row[:, None] & (n < N)[None, :])


def config_of(
    launcher: Launcher, op: str, rows: int, configs: dict[int, Config], weight: torch.Tensor
) -> Config:
    """Of tiles of so many rows: `configs`, unless this device was tuned. fp32, without tensor cores, takes smaller ones."""
    bucket, found = f"m{rows}", configs[rows]
    if weight.dtype == torch.float32:
        bucket = f"fp32-{bucket}"
        tiles = {"BLOCK_N": max(16, found.tiles["BLOCK_N"] // 4), "BLOCK_K": 32}
        found = Config(tiles, num_warps=4, num_stages=2)
    found = launcher.config(op, bucket, found)
    return Config(
        {**found.tiles, "BLOCK_M": max(rows, MIN_ROWS)}, found.num_warps, found.num_stages
    )


def project(
    launcher: Launcher,
    op: str,
    tensors: tuple[torch.Tensor, ...],  # out, x, experts, order, tiles, weight
    bias_EN: torch.Tensor | None,
    *,
    is_assigned: bool,
) -> None:
    """Launch the product; without an assignment each slot is a tile of its own, and `order` and `tiles` are not read."""
    _, x, experts_TK, _, _, weight_ENI = tensors
    (_, K), (E, N, width) = experts_TK.shape, weight_ENI.shape
    rows = tile_rows(experts_TK.numel(), E) if is_assigned else 1
    config = config_of(launcher, op, rows, CONFIGS, weight_ENI)
    num_tiles = experts_TK.numel() if rows == 1 else max_tiles(experts_TK.numel(), E)
    constexprs = {
        "N": N,
        "I": width,
        "SHARED": K if x.dim() == 2 else 1,
        "HAS_BIAS": bias_EN is not None,
        "IS_ASSIGNED": rows > 1,
        "UPCAST": launcher.upcast,
    }
    grid = (num_tiles * triton.cdiv(N, config.tiles["BLOCK_N"]),)
    launcher.launch(_expert_linear, grid, (*tensors, bias_EN), constexprs, config)


def bind(launcher: Launcher) -> Callable[..., None]:
    """The op on one device. Slow for many tokens, which is what `expert_gated` and `expert_down` are for."""

    def run(
        out_TKN: torch.Tensor,
        x: torch.Tensor,
        experts_TK: torch.Tensor,
        weight_ENI: torch.Tensor,
        bias_EN: torch.Tensor | None = None,
    ) -> None:
        tensors = (out_TKN, x, experts_TK, experts_TK, experts_TK, weight_ENI)
        project(launcher, "expert_linear", tensors, bias_EN, is_assigned=False)

    return run
