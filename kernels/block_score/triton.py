"""Scores of units in Triton: each head's by chunks of units, then, with every chunk's part of the logsumexp, the greatest.

Bound by bytes: the metadata of a context are read once, 4 * D bytes a unit and KV head. fp32 throughout, no tensor cores: a few
query heads share a unit. A result depends on its own request alone.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vivace.kernels.gpu.launcher import Config, Launcher
from vivace.kernels.selection import unit_tokens

CHUNK = 128  # units of a program
TILE = 32  # of these at a time
CONFIG = Config({"TILE": TILE}, num_warps=4, num_stages=2)
EXPECT = {target: {"score_heads *bf16:16": ("16-byte loads",)} for target in ("sm_80", "sm_90")}


@triton.jit
def is_sparse(context_len, budget, dense_layers, layer, U: tl.constexpr):
    """See `kernels.selection`."""
    return (layer >= dense_layers) & (budget > 0) & (budget < (context_len + U - 1) // U)


@triton.jit(do_not_specialize=["X", "layer", "scale", "H", "G"])
def score_heads(
    head_scores,  # fp32 [B, H, X * Z], out
    parts,  # fp32 [B, H, chunks, 2], out: maximum, sum of exp
    q,  # fp32 [T, H, D]
    meta,  # bf16 [N * Z, G, 2, D]
    block_tables,  # int32 [B, X]
    query_starts,  # int32 [B + 1]
    context_lens,  # int32 [B]
    budgets,  # int32 [B]
    dense_layers,  # int32 [B]
    X,
    layer,
    H,
    G,
    scale,
    D: tl.constexpr,
    U: tl.constexpr,
    Z: tl.constexpr,
    WIDTH: tl.constexpr,  # D, padded
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    b, g, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length, budget = tl.load(context_lens + b), tl.load(budgets + b)
    num_full = length // U
    is_mine = is_sparse(length, budget, tl.load(dense_layers + b), layer, U)
    if is_mine & (chunk * CHUNK < num_full):
        d = tl.arange(0, WIDTH)
        row = (tl.load(query_starts + b + 1) - 1).to(tl.int64)
        for i in range(H // G):
            h = g * (H // G) + i
            q_D = tl.load(q + (row * H + h) * D + d, mask=d < D, other=0.0) * scale
            best, total = -float("inf"), 0.0
            for first in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, num_full), TILE):
                j = first + tl.arange(0, TILE)
                is_full = j < num_full
                block = tl.load(block_tables + b.to(tl.int64) * X + j // Z, mask=is_full, other=0)
                unit = block.to(tl.int64) * Z + j % Z
                at = meta + ((unit * G + g) * 2 * D)[:, None] + d[None, :]
                mask = is_full[:, None] & (d < D)[None, :]
                mean = tl.load(at, mask=mask, other=0.0).to(tl.float32)
                std = tl.load(at + D, mask=mask, other=0.0).to(tl.float32)
                s = tl.sum(mean * q_D[None, :] + std * tl.abs(q_D)[None, :], 1)
                tl.store(head_scores + (b.to(tl.int64) * H + h) * X * Z + j, s, mask=is_full)
                s = tl.where(is_full, s, -float("inf"))
                more = tl.maximum(best, tl.max(s, 0))
                total = total * tl.exp(best - more) + tl.sum(tl.exp(s - more), 0)
                best = more
            part = parts + ((b.to(tl.int64) * H + h) * tl.num_programs(2) + chunk) * 2
            tl.store(part, best)
            tl.store(part + 1, total)


@triton.jit(do_not_specialize=["X", "layer", "H", "G"])
def best_of_heads(
    scores,  # fp32 [B, G, X * Z], out
    head_scores,  # fp32 [B, H, X * Z]
    parts,  # fp32 [B, H, chunks, 2]
    context_lens,  # int32 [B]
    budgets,  # int32 [B]
    dense_layers,  # int32 [B]
    X,
    layer,
    H,
    G,
    U: tl.constexpr,
    Z: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,  # parts that are read at a time
):
    b, g, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length, budget = tl.load(context_lens + b), tl.load(budgets + b)
    if is_sparse(length, budget, tl.load(dense_layers + b), layer, U):
        num_full = length // U
        j = chunk * CHUNK + tl.arange(0, CHUNK)
        best = tl.full((CHUNK,), -float("inf"), tl.float32)
        for i in range(H // G):
            head = b.to(tl.int64) * H + g * (H // G) + i
            most, total = -float("inf"), 0.0
            for first in range(0, tl.cdiv(num_full, CHUNK), PARTS):
                c = first + tl.arange(0, PARTS)
                part = parts + (head * tl.num_programs(2) + c) * 2
                is_part = c < tl.cdiv(num_full, CHUNK)
                m = tl.load(part, mask=is_part, other=-float("inf"))
                sums = tl.load(part + 1, mask=is_part, other=0.0)
                more = tl.maximum(most, tl.max(m, 0))
                total = total * tl.exp(most - more) + tl.sum(sums * tl.exp(m - more), 0)
                most = more
            s = tl.load(head_scores + head * X * Z + j, mask=j < num_full, other=-float("inf"))
            best = tl.maximum(best, s - (most + tl.log(total)))
        out = scores + (b.to(tl.int64) * G + g) * X * Z + j
        tl.store(out, tl.where(j < num_full, best, -float("inf")), mask=j < X * Z)


def bind(launcher: Launcher) -> Callable[..., None]:
    """The op on one device."""

    def run(
        scores_BGXZ: torch.Tensor,
        q_THD: torch.Tensor,
        meta: torch.Tensor,
        block_tables_BX: torch.Tensor,
        query_starts: torch.Tensor,
        context_lens_B: torch.Tensor,
        budgets_B: torch.Tensor,
        dense_layers_B: torch.Tensor,
        *,
        layer: int,
        scale: float,
        block_tokens: int,
    ) -> None:
        B, G, X, Z = scores_BGXZ.shape
        _, H, D = q_THD.shape
        chunks = triton.cdiv(X * Z, CHUNK)
        head_scores = launcher.scratch("block_score.heads", (B, H, X * Z), torch.float32)
        parts = launcher.scratch("block_score.parts", (B, H, chunks, 2), torch.float32)
        shape = {"U": unit_tokens(block_tokens), "Z": Z, "CHUNK": CHUNK}
        who = (context_lens_B, budgets_B, dense_layers_B, X, layer, H, G)
        launcher.launch(
            score_heads,
            (B, G, chunks),
            (head_scores, parts, q_THD, meta, block_tables_BX, query_starts, *who, scale),
            shape | {"D": D, "WIDTH": triton.next_power_of_2(D)},
            launcher.config("block_score", f"D={D}", CONFIG),
        )
        best = Config({"PARTS": 64}, num_warps=4, num_stages=1)
        launcher.launch(
            best_of_heads, (B, G, chunks), (scores_BGXZ, head_scores, parts, *who), shape, best
        )

    return run
