"""The exact choice of units in Triton: a radix select by 8 bits of the score at a time, a program per request and KV head.

Five passes over a row of scores, which stays in the L2 cache; bound by the latency of the passes.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vivace.kernels.block_score.triton import is_sparse
from vivace.kernels.gpu.launcher import Config, Launcher
from vivace.kernels.selection import RECENT_UNITS, SINK_UNITS, unit_tokens

CONFIG = Config({"TILE": 1024}, num_warps=8, num_stages=1)


@triton.jit
def keys_of(scores, j, num_units, SINKS: tl.constexpr, RECENT: tl.constexpr):
    """Order of the scores as unsigned numbers: 0 is NaN, then from -inf up, the greatest those that are always selected."""
    score = tl.load(scores + j, mask=j < num_units, other=0.0) + 0.0  # -0 and 0 are equal
    bits = score.to(tl.uint32, bitcast=True)
    key = bits ^ tl.where(bits >> 31 == 1, 0xFFFFFFFF, 0x80000000)
    key = tl.where(score == score, key, 0)
    return tl.where((j < SINKS) | (j >= num_units - RECENT), 0xFFFFFFFF, key)


@triton.jit(do_not_specialize=["X", "layer", "G"])
def block_topk(
    selected,  # int32 [B, G, X * Z], out
    num_selected,  # int32 [B, G], out
    scores,  # fp32 [B, G, X * Z]
    context_lens,  # int32 [B]
    budgets,  # int32 [B]
    dense_layers,  # int32 [B]
    X,
    layer,
    G,
    U: tl.constexpr,
    Z: tl.constexpr,
    SINKS: tl.constexpr,
    RECENT: tl.constexpr,
    TILE: tl.constexpr,
):
    b, g = tl.program_id(0), tl.program_id(1)
    row = b.to(tl.int64) * G + g
    length, budget = tl.load(context_lens + b), tl.load(budgets + b)
    if is_sparse(length, budget, tl.load(dense_layers + b), layer, U):
        num_units = tl.cdiv(length, U)
        threshold = tl.zeros((), tl.uint32)
        wanted = budget  # of those that share the threshold's leading bits
        digits = tl.arange(0, 256)
        for shift in tl.static_range(24, -1, -8):
            counts = tl.zeros((256,), tl.int32)
            for first in range(0, num_units, TILE):
                j = first + tl.arange(0, TILE)
                key = keys_of(scores + row * X * Z, j, num_units, SINKS, RECENT)
                is_in = j < num_units
                if shift < 24:
                    is_in = is_in & (key >> (shift + 8) == threshold >> (shift + 8))
                counts += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=is_in)
            above = tl.sum(counts, 0) - tl.cumsum(counts, 0)  # keys of a larger digit
            digit = tl.max(tl.where(above + counts >= wanted, digits, 0), 0)
            wanted -= tl.sum(tl.where(digits == digit, above, 0), 0)
            threshold = threshold | (digit.to(tl.uint32) << shift)
        num_ties, num_out = 0, 0
        for first in range(0, num_units, TILE):
            j = first + tl.arange(0, TILE)
            key = keys_of(scores + row * X * Z, j, num_units, SINKS, RECENT)
            is_tie = ((key == threshold) & (j < num_units)).to(tl.int32)
            rank = num_ties + tl.cumsum(is_tie, 0)  # from 1: the lower of equals come first
            is_out = ((key > threshold) | ((is_tie == 1) & (rank <= wanted))) & (j < num_units)
            place = num_out + tl.cumsum(is_out.to(tl.int32), 0) - 1
            tl.store(selected + row * X * Z + place, j, mask=is_out)
            num_ties += tl.sum(is_tie, 0)
            num_out += tl.sum(is_out.to(tl.int32), 0)
        tl.store(num_selected + row, budget)
    else:
        tl.store(num_selected + row, -1)


def bind(launcher: Launcher) -> Callable[..., None]:
    """The op on one device."""

    def run(
        selected_BGXZ: torch.Tensor,
        num_selected_BG: torch.Tensor,
        scores_BGXZ: torch.Tensor,
        context_lens_B: torch.Tensor,
        budgets_B: torch.Tensor,
        dense_layers_B: torch.Tensor,
        *,
        layer: int,
        block_tokens: int,
    ) -> None:
        B, G, X, Z = scores_BGXZ.shape
        who = (context_lens_B, budgets_B, dense_layers_B, X, layer, G)
        shape = {"U": unit_tokens(block_tokens), "Z": Z}
        launcher.launch(
            block_topk,
            (B, G),
            (selected_BGXZ, num_selected_BG, scores_BGXZ, *who),
            shape | {"SINKS": SINK_UNITS, "RECENT": RECENT_UNITS},
            launcher.config("block_topk", "any", CONFIG),
        )

    return run
