"""The kept share of attention in Triton: maximum and sums of each chunk of a context, then their join.

Reads K of the requests that are measured once; few rows are, so it is off the path of speed. fp32 without tensor cores.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vivace.kernels.gpu.launcher import Config, Launcher
from vivace.kernels.kv_read.triton import read_heads
from vivace.kernels.selection import unit_tokens

CHUNK = 1024  # positions of a program
CONFIG = Config({"TILE": 32}, num_warps=4, num_stages=2)
EXPECT = {target: {"weigh_chunk *bf16:16": ("16-byte loads",)} for target in ("sm_80", "sm_90")}


@triton.jit
def is_selected(units, selected, count):
    """Whether each unit is in the ascending list, of fewer than 2^20; by bisection."""
    low, high = tl.zeros_like(units), tl.zeros_like(units) + count
    for _ in range(20):
        middle = (low + high) // 2
        is_below = tl.load(selected + middle, mask=low < high, other=0) < units
        low = tl.where((low < high) & is_below, middle + 1, low)
        high = tl.where((low < high) & ~is_below, middle, high)
    return (low < count) & (tl.load(selected + low, mask=low < count, other=-1) == units)


@triton.jit
def capped(score, softcap):
    if softcap > 0:
        e = tl.exp(-2.0 * tl.abs(score) / softcap)
        size = softcap * (1.0 - e) / (1.0 + e)
        score = tl.where(score < 0, -size, size)
    return score


@triton.jit(do_not_specialize=["X", "H", "G", "scale", "softcap"])
def weigh_chunk(
    parts,  # fp32 [B, H, chunks, 3], out: maximum, sum of exp, sum of those that are kept
    q,  # fp32 [T, H, D]
    kv_cache,  # fp32, bf16 or int8 [N, 2, G, S, D or D + 4]
    block_tables,  # int32 [B, X]
    query_starts,  # int32 [B + 1]
    context_lens,  # int32 [B]
    selected,  # int32 [B, G, X * Z]
    num_selected,  # int32 [B, G]
    measured,  # int32 [B]
    X,
    H,
    G,
    scale,
    softcap,
    S: tl.constexpr,
    D: tl.constexpr,
    U: tl.constexpr,
    WIDTH: tl.constexpr,  # D, padded
    IS_INT8: tl.constexpr,
    UPCAST: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    b, g, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length, count = tl.load(context_lens + b), tl.load(num_selected + b * G + g)
    if (tl.load(measured + b) != 0) & (count >= 0) & (chunk * CHUNK < length):
        d = tl.arange(0, WIDTH)
        row = (tl.load(query_starts + b + 1) - 1).to(tl.int64)
        for i in range(H // G):
            h = g * (H // G) + i
            q_D = tl.load(q + (row * H + h) * D + d, mask=d < D, other=0.0) * scale
            most, total, kept = -float("inf"), 0.0, 0.0
            for first in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, length), TILE):
                position = first + tl.arange(0, TILE)
                is_there = position < length
                block = tl.load(block_tables + b * X + position // S, mask=is_there, other=0)
                at = (block.to(tl.int64) * 2 * G + g) * S + position % S
                k = read_heads(kv_cache, at[:, None], is_there[:, None], D, IS_INT8, UPCAST, WIDTH)
                score = capped(tl.sum(k * q_D[None, :], 1), softcap)
                score = tl.where(is_there, score, -float("inf"))
                more = tl.maximum(most, tl.max(score, 0))
                weight = tl.exp(score - more)
                is_kept = is_selected(position // U, selected + (b * G + g) * X * (S // U), count)
                kept = kept * tl.exp(most - more) + tl.sum(tl.where(is_kept, weight, 0.0), 0)
                total = total * tl.exp(most - more) + tl.sum(weight, 0)
                most = more
            part = parts + ((b * H + h) * tl.num_programs(2) + chunk) * 3
            tl.store(part, most)
            tl.store(part + 1, total)
            tl.store(part + 2, kept)


@triton.jit(do_not_specialize=["chunks", "H", "G", "has_before"])
def join_chunks(
    mass,  # fp32 [B, 2], out
    before,  # fp32 [B, 2], if has_before
    parts,  # fp32 [B, H, chunks, 3]
    context_lens,  # int32 [B]
    num_selected,  # int32 [B, G]
    measured,  # int32 [B]
    chunks,
    H,
    G,
    has_before,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,  # parts that are read at a time
):
    b = tl.program_id(0).to(tl.int64)
    share, count = 0.0, 0.0
    if has_before != 0:
        share, count = tl.load(before + b * 2), tl.load(before + b * 2 + 1)
    if (tl.load(measured + b) != 0) & (tl.load(num_selected + b * G) >= 0):
        mine = tl.cdiv(tl.load(context_lens + b), CHUNK)
        heads = 0.0
        for h in range(H):
            most, total, kept = -float("inf"), 0.0, 0.0
            for first in range(0, mine, PARTS):
                c = first + tl.arange(0, PARTS)
                part = parts + ((b * H + h) * chunks + c) * 3
                m = tl.load(part, mask=c < mine, other=-float("inf"))
                more = tl.maximum(most, tl.max(m, 0))
                keep, take = tl.exp(most - more), tl.exp(m - more)
                total = total * keep + tl.sum(take * tl.load(part + 1, mask=c < mine, other=0.0), 0)
                kept = kept * keep + tl.sum(take * tl.load(part + 2, mask=c < mine, other=0.0), 0)
                most = more
            heads += kept / total
        share += heads / H
        count += 1.0
    tl.store(mass + b * 2, share)
    tl.store(mass + b * 2 + 1, count)


def bind(launcher: Launcher) -> Callable[..., None]:
    """The op on one device."""

    def run(
        mass_B2: torch.Tensor,
        q_THD: torch.Tensor,
        kv_cache: torch.Tensor,
        block_tables_BX: torch.Tensor,
        query_starts: torch.Tensor,
        context_lens_B: torch.Tensor,
        selected_BGXZ: torch.Tensor,
        num_selected_BG: torch.Tensor,
        measured_B: torch.Tensor,
        before_B2: torch.Tensor | None = None,
        *,
        num_kv_heads: int,
        scale: float,
        softcap: float = 0.0,
    ) -> None:
        (_, H, D), S = q_THD.shape, kv_cache.shape[3]
        B, G, X, _ = selected_BGXZ.shape
        chunks = triton.cdiv(X * S, CHUNK)
        parts = launcher.scratch("kept_mass", (B, H, chunks, 3), torch.float32)
        where = (block_tables_BX, query_starts, context_lens_B)
        which = (selected_BGXZ, num_selected_BG, measured_B)
        shape = {"CHUNK": CHUNK}
        widths = {"S": S, "D": D, "U": unit_tokens(S), "WIDTH": triton.next_power_of_2(D)}
        types = {"IS_INT8": kv_cache.dtype == torch.int8, "UPCAST": launcher.upcast}
        launcher.launch(
            weigh_chunk,
            (B, G, chunks),
            (parts, q_THD, kv_cache, *where, *which, X, H, G, scale, softcap),
            shape | widths | types,
            launcher.config("kept_mass", f"D={D}", CONFIG),
        )
        join = Config({"PARTS": 64}, num_warps=1, num_stages=1)
        before = mass_B2 if before_B2 is None else before_B2  # a pointer that nobody follows
        lists = (context_lens_B, num_selected_BG, measured_B)
        args = (mass_B2, before, parts, *lists, chunks, H, G, int(before_B2 is not None))
        launcher.launch(join_chunks, (B,), args, shape, join)

    return run
