"""The joining of experts' rows in Triton. Bound by bytes: K + 2 rows of M read and written a token; at batch 1 by launch.

Sums run over k in order in each column, so nothing depends on the grid. Limits: K rows are loaded at once, K <= 32 or so.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vivace.kernels.gated.triton import exp
from vivace.kernels.gpu.launcher import Config, Launcher

CONFIG = Config({"BLOCK_M": 1024}, num_warps=4)
CANDIDATES = {
    "any": tuple(
        Config({"BLOCK_M": n}, num_warps=w) for n in (256, 512, 1024, 2048) for w in (2, 4)
    )
}


@triton.jit
def _moe_combine(
    out_ptr,  # fp32 [T, M], out
    y_ptr,  # fp32 [T, K, M]
    weights_ptr,  # fp32 [T, K]
    shared_ptr,  # fp32 [T, M]
    shared_gate_ptr,  # fp32 [T, 1]
    M: tl.constexpr,
    K: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    HAS_GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    NUM_M: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    t = (tl.program_id(0) // NUM_M).to(tl.int64)
    m = tl.program_id(0) % NUM_M * BLOCK_M + tl.arange(0, BLOCK_M)
    is_in = m < M
    total = tl.zeros((BLOCK_M,), tl.float32)
    for k in tl.static_range(K):
        y = tl.load(y_ptr + (t * K + k) * M + m, mask=is_in, other=0)
        total += tl.load(weights_ptr + t * K + k) * y
    if HAS_SHARED:
        shared = tl.load(shared_ptr + t * M + m, mask=is_in, other=0)
        if HAS_GATE:
            gate = tl.load(shared_gate_ptr + t)
            shared *= tl.div_rn(1.0, 1.0 + exp(-gate))
        total += shared
    tl.store(out_ptr + t * M + m, total, mask=is_in)


def bind(launcher: Launcher) -> Callable[..., None]:
    """The op on one device."""
    config = launcher.config("moe_combine", "any", CONFIG)

    def run(
        out_TM: torch.Tensor,
        y_TKM: torch.Tensor,
        weights_TK: torch.Tensor,
        shared_TM: torch.Tensor | None = None,
        shared_gate_T1: torch.Tensor | None = None,
    ) -> None:
        T, K, M = y_TKM.shape
        args = (out_TM, y_TKM, weights_TK, shared_TM, shared_gate_T1)
        constexprs = {
            "M": M,
            "K": K,
            "HAS_SHARED": shared_TM is not None,
            "HAS_GATE": shared_gate_T1 is not None,
        }
        grid = (T * triton.cdiv(M, config.tiles["BLOCK_M"]),)
        launcher.launch(_moe_combine, grid, args, constexprs, config)

    return run
