"""The first half of the experts' MLPs in Triton: as `expert_linear`, with gate and up side by side and the activation at the
end, so that 2F numbers a slot never travel. Bounds and limits are those of kernels/expert_linear/triton.py.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vivace.kernels.expert_linear.triton import config_of, product, slots_of, tile_of
from vivace.kernels.gated.triton import activated
from vivace.kernels.gpu.launcher import Config, Launcher
from vivace.kernels.moe_assign import max_tiles, tile_rows

CONFIGS = {  # by rows of a tile; BLOCK_N columns of gate, and as many of up
    1: Config({"BLOCK_N": 16, "BLOCK_K": 128}, num_warps=4, num_stages=4),
    16: Config({"BLOCK_N": 32, "BLOCK_K": 128}, num_warps=4, num_stages=4),
    64: Config({"BLOCK_N": 64, "BLOCK_K": 64}, num_warps=4, num_stages=4),
    128: Config({"BLOCK_N": 64, "BLOCK_K": 64}, num_warps=8, num_stages=3),
}
CANDIDATES = {
    bucket: tuple(
        Config({"BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for n, k, warps, stages in found
    )
    for bucket, found in {
        "m1": [(16, 128, 4, 5), (16, 256, 4, 3), (32, 128, 4, 4), (32, 256, 4, 3), (32, 64, 4, 5)],
        "m16": [(16, 128, 4, 5), (32, 64, 4, 6), (32, 256, 4, 3), (64, 64, 4, 4), (64, 128, 8, 3)],
        "m64": [(32, 64, 4, 4), (64, 64, 8, 4), (128, 64, 8, 3), (64, 128, 8, 2)],
        "m128": [(64, 64, 8, 4), (128, 64, 8, 2), (128, 64, 8, 3), (32, 64, 4, 4)],
    }.items()
}
EXPECT = {
    "sm_80": {"_expert_gated": ("16-byte loads",), "_expert_gated *bf16:16": ("HMMA",)},
    "sm_90": {
        "_expert_gated": ("16-byte loads",),
        "_expert_gated *bf16:16 BLOCK_M=16": ("HMMA",),
        "_expert_gated *bf16:16 BLOCK_M=64": ("HGMMA",),
        "_expert_gated *bf16:16 BLOCK_M=128": ("HGMMA",),
    },
}


@triton.jit
def _expert_gated(
    out_ptr,  # fp32 [T, K, F], out
    x_ptr,  # fp32 [T, M]
    experts_ptr,  # int32 [T, K]
    order_ptr,  # int32 [T, K]
    tiles_ptr,  # int32 [T, K, 3]
    weight_ptr,  # fp32, bf16 or fp16 [E, 2F, M]
    bias_ptr,  # fp32 [E, 2F]
    alpha,
    limit,
    F: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_ASSIGNED: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    NUM_N: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    expert, begin, end = tile_of(tl.program_id(0) // NUM_N, experts_ptr, tiles_ptr, IS_ASSIGNED)
    if expert < 0:
        return
    slot, is_row = slots_of(begin, end, order_ptr, IS_ASSIGNED, BLOCK_M)
    n = tl.program_id(0) % NUM_N * BLOCK_N + tl.arange(0, BLOCK_N)
    is_n = n < F
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (slot // K * M)[:, None] + k[None, :]
    gate_ptrs = weight_ptr + expert.to(tl.int64) * (2 * F * M) + (n * M)[None, :] + k[:, None]
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, M, BLOCK_K):
        is_k = start + k < M
        is_w = is_n[None, :] & is_k[:, None]
        x = tl.load(x_ptrs + start, mask=is_row[:, None] & is_k[None, :], other=0)
        gate = product(x, gate_ptrs + start, gate, is_w, UPCAST)
        up = product(x, gate_ptrs + F * M + start, up, is_w, UPCAST)
    if HAS_BIAS:
        bias_ptrs = bias_ptr + expert.to(tl.int64) * (2 * F) + n
        gate += tl.load(bias_ptrs, mask=is_n, other=0)[None, :]
        up += tl.load(bias_ptrs + F, mask=is_n, other=0)[None, :]
    out_ptrs = out_ptr + (slot * F)[:, None] + n[None, :]
    act = activated(gate, up, alpha, limit, ACTIVATION)
    tl.store(out_ptrs, act, mask=is_row[:, None] & is_n[None, :])


def bind(launcher: Launcher) -> Callable[..., None]:
    """The op on one device."""

    def run(
        out_TKF: torch.Tensor,
        x_TM: torch.Tensor,
        experts_TK: torch.Tensor,
        order_TK: torch.Tensor,
        tiles_TK3: torch.Tensor,
        gate_up_ENM: torch.Tensor,
        bias_EN: torch.Tensor | None = None,
        *,
        activation: str = "silu",
        alpha: float = 1.702,
        limit: float = 7.0,
    ) -> None:
        (_, K, F), (E, _, M) = out_TKF.shape, gate_up_ENM.shape
        rows = tile_rows(experts_TK.numel(), E)
        config = config_of(launcher, "expert_gated", rows, CONFIGS, gate_up_ENM)
        constexprs = {
            "F": F,
            "M": M,
            "K": K,
            "ACTIVATION": activation,
            "HAS_BIAS": bias_EN is not None,
            "IS_ASSIGNED": rows > 1,
            "UPCAST": launcher.upcast,
        }
        args = (out_TKF, x_TM, experts_TK, order_TK, tiles_TK3, gate_up_ENM, bias_EN, alpha, limit)
        num_blocks = triton.cdiv(F, config.tiles["BLOCK_N"])
        grid = (max_tiles(experts_TK.numel(), E) * num_blocks,)
        launcher.launch(_expert_gated, grid, args, constexprs, config)

    return run
